"""Optimal brain surgeon on heads, against its definition, and the one gradient pass that feeds it."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_prepare_tools import tiny

from sspcompile.criteria import fisher
from sspcompile.criteria.curvature import RIDGE, curvature, removal_costs
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.gradients import read_gradients, state_gradients
from sspcompile.model.hooks import channel_gates
from sspcompile.model.logits import decoder_output
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.text import Batch, batches_of, continued, with_continuations

PROMPTS = ("please tell me about acid", "the sum of three and four", "who was king in the year of war")


@pytest.fixture(scope="module")
def loaded():
    return tiny("qwen2", layers=3, hidden=64, heads=4, kv_heads=2, scale=0.3)


@pytest.fixture(scope="module")
def batches(loaded):
    return with_continuations(loaded, PROMPTS, 3)


def information_of_gates(loaded: LoadedModel, texts: Sequence[Batch], seed: int) -> np.ndarray:
    """Fisher information of a gate on every channel [layers, channels], by autograd, of texts that stand alone."""
    wanted = np.zeros((loaded.geometry.layers, loaded.geometry.channels))
    for batch in texts:
        gates = torch.ones(wanted.shape, requires_grad=True)
        with torch.enable_grad(), channel_gates(loaded, gates):
            states = decoder_output(loaded, batch)[batch.score_mask]
            generator = fisher.batch_generator(loaded, seed, batch)
            towards = state_gradients(
                loaded, states, lambda logits, generator=generator: fisher.logit_cotangent(logits, "normal", generator)
            )
            (gradient,) = torch.autograd.grad(states, gates, towards)
        wanted += gradient.double().square().numpy() / int(batch.score_mask.sum()) / len(texts)
    return wanted


def second_order(weight: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, zero: torch.Tensor):
    """The least 1/2 tr(D^T G D H) over all changes D of W after which the columns `zero` are zero, by brute force.

    Solved as one dense quadratic problem in all entries of D, with the constraint put in by elimination.
    """
    free = [c for c in range(len(inputs)) if c not in zero.tolist()]
    quadratic = torch.kron(outputs, inputs)  # over D flattened row by row
    d, n = weight.shape
    fixed = torch.zeros(d, n, dtype=torch.float64)
    fixed[:, zero] = -weight[:, zero]
    place = torch.tensor([row * n + column for row in range(d) for column in free], dtype=torch.int64)
    flat = fixed.flatten()
    towards = -(quadratic @ flat)[place]
    flat[place] = torch.linalg.solve(quadratic[place][:, place], towards)
    return 0.5 * float(flat @ quadratic @ flat), weight + flat.view(d, n)


def test_cost_and_change_are_those_of_the_best_compensation():
    """Every step against the quadratic problem that it solves in closed form; the second on what the first left."""
    rng = torch.Generator().manual_seed(0)
    d, n, units = 3, 6, 3

    def spread(size: int) -> torch.Tensor:
        root = torch.randn(size, size + 2, generator=rng, dtype=torch.float64)
        return root @ root.T

    weight, outputs, inputs = torch.randn(d, n, generator=rng, dtype=torch.float64), spread(d), spread(n)
    found = removal_costs(inputs, weight.T @ outputs @ weight, units)
    damped = inputs + RIDGE * inputs.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    channels = [[0, 1], [2, 3], [4, 5]]
    left, gone, costs = [0, 1, 2], [], {}
    while left:
        # What is left is free to change, what went stays away.
        keep = [c for c in range(n) if c not in gone]
        tried = {}
        for unit in left:
            zero = torch.tensor([keep.index(c) for c in channels[unit]])
            tried[unit] = second_order(weight[:, keep], outputs, damped[keep][:, keep], zero)
        unit = min(left, key=lambda u: tried[u][0])
        costs[unit], changed = tried[unit]
        weight = weight.clone()
        weight[:, keep] = changed
        gone += channels[unit]
        left.remove(unit)
    order = list(costs)
    assert found[order] == pytest.approx(np.maximum.accumulate(list(costs.values())), rel=1e-5)


def test_gradients_of_one_pass_are_those_of_autograd(loaded, batches):
    """x and y at every o_proj, against the whole graph at once and without recomputing anything."""
    (batch,) = batches
    modules = [o_proj(layer) for layer in loaded.layers]

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-1, 1, logits.numel()).view_as(logits)

    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    order = []

    def read(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        order.append(index)
        found[index] = x.clone(), y.clone()

    read_gradients(loaded, batch, modules, "o_proj", objective, read)
    assert order == [2, 1, 0]
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, index=index: seen.__setitem__(index, args[0]))
        for index, module in enumerate(modules)
    ]
    embedding = loaded.model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_()))
    with torch.enable_grad():
        states = decoder_output(loaded, batch)[batch.score_mask]
        logits = loaded.logits_of(states)
        wanted = torch.autograd.grad((objective(logits.detach()) * logits).sum(), [seen[i] for i in range(3)])
    for hook in hooks:
        hook.remove()
    for index in range(3):
        torch.testing.assert_close(found[index][0], seen[index].detach())
        torch.testing.assert_close(found[index][1], wanted[index], rtol=1e-4, atol=1e-7)


def test_a_pass_holds_no_inside_of_a_layer_between_forward_and_backward(loaded, batches):
    """On a large model the inputs of down_proj, held for every layer, would be most of its memory."""
    (batch,) = batches
    intermediate = loaded.geometry.intermediate
    held = []

    def objective(logits: torch.Tensor) -> torch.Tensor:  # called between the two
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        held.append([one.shape for one in tensors if one.dim() == 3 and one.shape[-1] == intermediate])
        return torch.ones_like(logits)

    modules = [down_proj(layer) for layer in loaded.layers]
    widths = []
    read_gradients(loaded, batch, modules, "down_proj", objective, lambda _index, x, _y: widths.append(x.shape[-1]))
    assert widths == [intermediate] * loaded.geometry.layers
    assert held == [[]]


def test_logits_in_parts_give_the_gradients_of_the_whole(loaded, monkeypatch):
    states = torch.randn(7, loaded.geometry.hidden, generator=torch.Generator().manual_seed(1))
    whole = state_gradients(loaded, states, torch.sin)
    monkeypatch.setattr("sspcompile.model.logits.LOGITS_AT_ONCE", 3 * loaded.vocab)
    torch.testing.assert_close(state_gradients(loaded, states, torch.sin), whole, rtol=1e-4, atol=1e-5)


def test_gates_of_the_pass_are_the_fisher_score(loaded, batches):
    given = CriterionInput(batches, len(PROMPTS), seed=3)
    found, wanted = curvature(loaded, given), fisher.information(loaded, given, "normal", 1)
    np.testing.assert_allclose(found.gates, wanted, rtol=1e-3, atol=1e-6 * wanted.max())
    units = Units.of(loaded.geometry, "group")
    grouped = CriterionInput(batches, len(PROMPTS), seed=3, granularity="group")
    wanted = fisher.information(loaded, grouped, "normal", 1)
    np.testing.assert_allclose(curvature(loaded, grouped).gates, wanted, rtol=1e-3, atol=1e-6 * wanted.max())
    assert found.gates.shape[-1] == 4 and wanted.shape[-1] == units.count


def test_channels_of_the_pass_are_the_fisher_information_of_their_gates(loaded):
    """Each text by itself, so that gates of its own can be had from autograd: the same draws of the same batches."""
    texts = batches_of(loaded, continued(loaded, PROMPTS, new_tokens=3), 1)
    assert [batch.rows for batch in texts] == [(0,), (1,), (2,)]
    found = curvature(loaded, CriterionInput(texts, len(PROMPTS), seed=3)).channels
    wanted = information_of_gates(loaded, texts, 3)
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_a_pass_leaves_nothing_behind(loaded, batches):
    """A hook that held its own tensor kept the graph of every layer alive: 10 GB on a model of 135 M parameters."""

    def tensors() -> int:
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    given = CriterionInput(batches, len(PROMPTS))
    curvature(loaded, given)
    gc.collect()
    before = tensors()
    for _ in range(3):
        curvature(loaded, given)
    assert tensors() <= before + 1
