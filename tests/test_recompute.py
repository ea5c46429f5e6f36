"""Gradients by recomputing are those of a plain backward pass, bit for bit, in the memory of one layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from test_streaming import on_disk

from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from sspcompile.model.logits import decoder_output, scored_logits
from sspcompile.model.modules import down_proj
from sspcompile.model.recompute import recomputed
from sspcompile.model.text import encode
from sspcompile.model.weights import replaced

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = Shape("llama", layers=LAYERS, hidden=64, kv_heads=4, head_dim=16)
    return make_checkpoint(tmp_path_factory.mktemp("model") / "dense", shape)


def gate_gradient(loaded, layers, *, inside: bool = True, other: torch.Tensor | None = None) -> torch.Tensor:
    """Of the sum of squared logits, by a gate per head and prompt; the backward pass inside of all contexts, or not."""
    (batch,) = encode(loaded, ["What is 3 plus 4?", "Name a metal."], 32)
    gates = torch.full((LAYERS, 2, 8), 0.7, requires_grad=True)
    changed = {} if other is None else {"weight": other}
    with torch.enable_grad(), recomputed(layers), head_gates(loaded, gates):
        with replaced(down_proj(loaded.layers[3]), changed):
            loss = scored_logits(loaded, decoder_output(loaded, batch), batch.score_mask).square().sum()
        if inside:
            return torch.autograd.grad(loss, gates)[0]
    return torch.autograd.grad(loss, gates)[0]


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_gradients_are_those_of_a_plain_backward_pass(model, inside, stored):
    whole = load(model, fingerprint="")
    loaded = on_disk(model) if stored else whole
    expected = gate_gradient(whole, [])
    assert expected.abs().min() > 0
    assert gate_gradient(loaded, loaded.layers, inside=inside).equal(expected)
    other = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 48))).float()
    mended = gate_gradient(whole, [], other=other)
    assert not mended.equal(expected)
    assert gate_gradient(loaded, loaded.layers, inside=inside, other=other).equal(mended)
    # Nothing of it stays behind.
    assert gate_gradient(loaded, [], inside=True).equal(expected)
    assert all(("forward" in vars(layer)) == stored for layer in loaded.layers)


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "on disk"])
def test_a_backward_pass_keeps_the_inputs_of_layers_and_the_inside_of_one(model, stored):
    loaded = on_disk(model) if stored else load(model, fingerprint="")

    def kept(layers) -> int:
        """Bytes that autograd holds when the forward pass is over."""
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        (batch,) = encode(loaded, ["What is 3 plus 4, and what is 5 plus 6 plus 7 plus 8?"], 64)
        gates = torch.ones(LAYERS, 1, 8, requires_grad=True)
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.enable_grad(), saving, recomputed(layers), head_gates(loaded, gates):
            output = decoder_output(loaded, batch)
        assert output.requires_grad
        return sum(held.values())

    assert kept(loaded.layers) < kept([]) / 10


def test_without_gradients_nothing_changes(model):
    loaded = load(model, fingerprint="")
    (batch,) = encode(loaded, ["Name a metal."], 32)
    with torch.inference_mode():
        expected = decoder_output(loaded, batch)
        with recomputed(loaded.layers):
            assert decoder_output(loaded, batch).equal(expected)
