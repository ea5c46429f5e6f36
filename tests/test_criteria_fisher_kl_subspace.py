"""Subspace score worked by hand, gate gradients against finite differences, leave-one-out KL against brute force."""

import numpy as np
import pytest
import torch
from test_prepare_tools import tiny

from sspcompile.criteria import fisher, kl, measuring, subspace
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.errors import InputError
from sspcompile.model import logits, text
from sspcompile.model.hooks import head_gates
from sspcompile.prepare import importance

PROMPTS = ["tell me about acid ?", "what is the sum of a prime and a root ?", "war", "tell me about the king ?"]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def hand_model():
    """One layer, d = 4, two heads of size 2, and every token's residual is (2, 0, 0, 0), so its RMS norm is too.

    Attention over equal values returns the value: head 0 puts out (3, 4), head 1 (1, 1), at every position.
    """
    loaded = tiny("llama", layers=1, hidden=4, heads=2, kv_heads=2)
    inner = loaded.model.model
    attention = inner.layers[0].self_attn
    inner.embed_tokens.weight.zero_()[:, 0] = 2.0
    attention.v_proj.weight.zero_()[:, 0] = torch.tensor([1.5, 2.0, 0.5, 0.5])
    # head 0 writes its output into coordinates 0 and 1; head 1 writes (2 b, a, 0, 0) for its output (a, b)
    attention.o_proj.weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    return loaded


def test_importance_formula_by_hand_on_two_heads():
    # writes: head 0 (3, 4, 0, 0) with |w|^2 = 25; head 1 (2, 1, 0, 0) with |w|^2 = 5
    # u_1 = (1, 0, 0, 0), u_2 = (0.6, 0.8, 0, 0)
    # head 0: u_1.w = 3, u_2.w = 1.8 + 3.2 = 5;   head 1: u_1.w = 2, u_2.w = 1.2 + 0.8 = 2
    directions = np.array([[[1.0, 0, 0, 0], [0.6, 0.8, 0, 0]]])
    loaded = hand_model()
    batches = text.encode(loaded, ["war", "tell me about acid ?"])
    hidden = subspace.subspace(loaded, CriterionInput(batches, 2, directions), "hidden")
    probe = subspace.subspace(loaded, CriterionInput(batches, 2, directions), "probe")
    for prompt in range(2):
        np.testing.assert_allclose(hidden[prompt, 0], [[9 / 25, 25 / 25], [4 / 5, 4 / 5]], rtol=1e-4)
        np.testing.assert_allclose(probe[prompt, 0], [[9 / 34, 25 / 34], [4 / 8, 4 / 8]], rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fault_importance_uses_true_heads_of_the_models_own_size_and_no_bias(family):
    """GQA, head_dim != d / H, o_proj bias: against each head's write formed explicitly."""
    loaded = tiny(family, heads=4, kv_heads=2, hidden=16, head_dim=6, o_bias=True)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 2, 16))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    batches = text.encode(loaded, PROMPTS)
    found = subspace.subspace(loaded, CriterionInput(batches, len(PROMPTS), directions), "hidden")
    row = 1
    (single,) = text.encode(loaded, [PROMPTS[row]])
    heads = {}
    handles = [
        y.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, i=i: heads.update({i: a[0][0].double()}))
        for i, y in enumerate(loaded.layers)
    ]
    loaded.model(single.input_ids)
    for handle in handles:
        handle.remove()
    for layer, module in enumerate(loaded.layers):
        weight = module.self_attn.o_proj.weight.double().numpy()
        for head in range(4):
            write = heads[layer][:, head * 6 : head * 6 + 6].numpy() @ weight[:, head * 6 : head * 6 + 6].T
            share = (write @ directions[layer].T) ** 2 / ((write**2).sum(-1, keepdims=True) + subspace.EPS)
            np.testing.assert_allclose(found[row, layer, head], share.mean(0), rtol=1e-4, atol=1e-6)


def test_fault_importance_does_not_saturate_and_does_not_see_padding():
    loaded = tiny()
    directions = np.random.default_rng(1).normal(size=(3, 2, 16))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    together = subspace.hidden(loaded, CriterionInput(text.encode(loaded, PROMPTS), 4, directions))
    alone = [subspace.hidden(loaded, CriterionInput(text.encode(loaded, [p]), 1, directions))[0] for p in PROMPTS]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    assert ((together > 0.001) & (together < 0.999)).mean() > 0.9


def objective(loaded, batch, gates, target):
    with torch.no_grad(), head_gates(loaded, gates):
        found = logits.scored_logits(loaded, logits.decoder_output(loaded, batch), batch.score_mask)
    return torch.log_softmax(found.double(), -1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("opening", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_gradient_per_sequence_equals_finite_difference(family, opening):
    loaded = tiny(family, layers=2, seed=3)
    batch = text.with_continuations(loaded, PROMPTS, 3)[-1]
    stand, step = opening * torch.ones(2, 4), 3e-3
    (gradient,) = fisher.gate_gradients(
        loaded, batch, Units(2, 4, 1), "greedy", 1, torch.Generator(), opened=stand.numpy()
    )
    with torch.no_grad(), head_gates(loaded, stand):
        target = logits.scored_logits(loaded, logits.decoder_output(loaded, batch), batch.score_mask).argmax(-1)
    owner = batch.score_mask.nonzero()[:, 0]
    for layer, head in [(0, 0), (0, 3), (1, 1)]:
        shift = torch.zeros(2, 4)
        shift[layer, head] = step
        difference = objective(loaded, batch, stand + shift, target) - objective(loaded, batch, stand - shift, target)
        numeric = torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, owner, difference) / (2 * step)
        torch.testing.assert_close(gradient[:, layer, head].double(), numeric, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("targets", ["normal", "sampled"])
def test_cotangents_have_the_covariance_of_the_fisher_information(targets):
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]]).expand(40_000, 4)
    draws = fisher.logit_cotangent(logits, targets, torch.Generator().manual_seed(0))
    p = torch.softmax(logits[0], -1)
    torch.testing.assert_close(draws.T @ draws / len(draws), torch.diag(p) - torch.outer(p, p), rtol=0, atol=8e-3)
    torch.testing.assert_close(draws.mean(0), torch.zeros(4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("opening", [pytest.param(1.0, marks=pytest.mark.whole), 0.5])
def test_fisher_estimates_agree_with_the_exact_diagonal(opening):
    loaded = tiny(layers=2, seed=3)
    (batch,) = text.encode(loaded, PROMPTS[:1])
    gates = torch.full((2, 1, 4), opening, requires_grad=True)
    with head_gates(loaded, gates):
        scored = logits.scored_logits(loaded, logits.decoder_output(loaded, batch), batch.score_mask)[0]
    rows = torch.stack([torch.autograd.grad(x, gates, retain_graph=True)[0].flatten() for x in scored])
    p = torch.softmax(scored, -1).detach()
    exact = torch.einsum("vh,v,vh->h", rows, p, rows) - (p @ rows) ** 2
    for targets in ("normal", "sampled"):
        found = fisher.information(loaded, CriterionInput([batch], 1), targets, 600, np.full((2, 4), opening))[
            0
        ].ravel()
        np.testing.assert_allclose(found, exact.numpy(), rtol=0.35, atol=float(exact.max()) * 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_leave_one_out_equals_the_brute_force_masked_forward(family):
    loaded = tiny(family, seed=2)
    batches = text.with_continuations(loaded, PROMPTS, 3)
    found = kl.leave_one_out(loaded, CriterionInput(batches, len(PROMPTS)))
    for batch in batches:
        with torch.no_grad():
            dense = torch.log_softmax(loaded.model(batch.input_ids).logits, -1)
        for layer, head in [(0, 1), (1, 3), (2, 0)]:
            gates = torch.ones(3, 4)
            gates[layer, head] = 0
            with torch.no_grad(), head_gates(loaded, gates):
                closed = torch.log_softmax(loaded.model(batch.input_ids).logits, -1)
            divergence = (dense.exp() * (dense - closed)).sum(-1)
            for place, row in enumerate(batch.rows):
                mean = divergence[place][batch.score_mask[place]].mean().item()
                assert found[row, layer, head] == pytest.approx(mean, rel=1e-3, abs=1e-6)


def test_a_head_that_writes_nothing_has_no_importance():
    loaded = tiny(seed=2)
    loaded.layers[1].self_attn.o_proj.weight[:, 8:12] = 0  # head 2 of layer 1
    for name in ("fisher", "fisher-sampled", "fisher-greedy", "kl"):
        found = importance.importance_of(loaded, name, PROMPTS, continuation_tokens=2)
        assert found.shape == (3, 4)
        assert found[1, 2] == pytest.approx(0, abs=1e-7)
        assert (np.delete(found.ravel(), 6) > 0).all(), name


def test_fisher_is_the_same_for_the_same_seed_and_not_for_another():
    loaded = tiny(seed=2)
    first, again, other = (importance.importance_of(loaded, "fisher", PROMPTS, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fisher_of_a_prompt_does_not_depend_on_the_batch_it_is_in():
    loaded = tiny(seed=2)
    together = fisher.greedy(loaded, CriterionInput(text.with_continuations(loaded, PROMPTS, 2), 4))
    for row, prompt in enumerate(PROMPTS):
        alone = fisher.greedy(loaded, CriterionInput(text.with_continuations(loaded, [prompt], 2), 1))[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-3, atol=1e-7)


def test_unknown_criterion_lists_the_names_and_subspace_asks_for_the_toolkit():
    loaded = tiny()
    with pytest.raises(InputError, match="fisher, "):
        importance.importance_of(loaded, "magic", PROMPTS)
    with pytest.raises(InputError, match="toolkit"):
        importance.importance_of(loaded, "subspace", PROMPTS)


def test_every_domain_is_read_by_its_own_axis_on_its_own_prompts():
    values = np.arange(3 * 1 * 1 * 2, dtype=float).reshape(3, 1, 1, 2)
    labels = np.array([0, 1, 1])
    scores = measuring.Scores(values, labels, "prompt", 3)
    assert scores.by_domain(2).tolist() == [[[0.0, (3 + 5) / 2]]]
