"""A model whose weights lie on disk gives what the same model in memory gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from transformers import AutoModelForCausalLM

from sspcompile.criteria.channels import head_columns
from sspcompile.errors import InputError
from sspcompile.model.capture import features
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from sspcompile.model.modules import o_proj
from sspcompile.model.placement import DEVICE_MAPS, ON_CPU, Placement, loading_options, placement_of, resolve
from sspcompile.model.weights import input_device, weight_of

SPREAD = Placement(device="cpu", dtype="float32", device_map="auto")
PROMPTS = ["What is 3 plus 4?", "Name a metal.", "x"]


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path / "dense", Shape(layers=3, hidden=64, kv_heads=4, head_dim=16))


def test_unknown_map_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="Accepted: auto"):
        placement_of({"device_map": "everywhere"}, {})
    assert loading_options(resolve(ON_CPU)) == {} and "auto" in DEVICE_MAPS


def test_weights_on_disk_are_found_and_give_the_same_features(model, tmp_path):
    whole = load(model, fingerprint="")
    spread = load(model, fingerprint="", placement=SPREAD)
    # As if the memory held a third of it: nothing is left but the disk.
    stored = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map="auto", max_memory={"cpu": 100_000}, offload_folder=tmp_path / "offload"
    )
    object.__setattr__(spread, "model", stored)
    assert o_proj(spread.layers[2]).weight.is_meta and input_device(stored) == torch.device("cpu") == spread.device
    assert np.array_equal(features(spread, PROMPTS, 16), features(whole, PROMPTS, 16))
    for layer in range(3):
        assert weight_of(o_proj(spread.layers[layer])).equal(o_proj(whole.layers[layer]).weight)
        assert head_columns(spread, layer).equal(head_columns(whole, layer))
    gates = torch.ones(3, 8)
    gates[1, :3] = 0
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), head_gates(whole, gates), head_gates(spread, gates):
        assert stored(ids).logits.equal(whole.model(ids).logits)
