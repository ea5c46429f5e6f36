"""A model whose layers are read from disk computes what the same model in memory computes, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from builders import Shape, family_config, make_checkpoint, save_random
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import InputError
from sspcompile.families import FAMILIES, geometry_of
from sspcompile.model.capture import features
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load, load_cut
from sspcompile.model.modules import down_proj, o_proj, projection_weight
from sspcompile.model.placement import ON_CPU, Place, Placement, resolve
from sspcompile.model.streaming import in_memory, layers_that_fit, open_streaming
from sspcompile.model.text import continued, with_continuations
from sspcompile.model.weights import replaced, tensor_of
from sspcompile.model.working import working_bytes
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import masked
from sspcompile.slicing.mask import Kept
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

PROMPTS = ["What is 3 plus 4?", "Name a metal.", "x"]
IDS = torch.tensor([[1, 5, 9, 200, 17, 4], [3, 3, 8, 100, 5, 6]])


def on_disk(model, resident: int = 0, **options) -> LoadedModel:
    """As `load`, with all layers but the first `resident` on disk."""
    whole = load(model, fingerprint="", **options)
    place = resolve(ON_CPU)
    attention = whole.geometry.family.attention
    object.__setattr__(whole, "model", open_streaming(model, place, resident, attention, trust_remote_code=False))
    return whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = Shape("llama", layers=3, hidden=64, kv_heads=4, head_dim=16, bias=True)
    return make_checkpoint(tmp_path_factory.mktemp("model") / "dense", shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_the_same_from_disk(family, dtype, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, bias=True), seed=1, dtype=dtype)
    whole, stored = load(source, fingerprint=""), on_disk(source, resident=1)
    assert not any(parameter.is_meta for parameter in stored.layers[0].parameters())
    assert all(parameter.is_meta for parameter in stored.layers[2].parameters())
    with torch.inference_mode():
        assert stored.model(IDS).logits.equal(whole.model(IDS).logits)
    assert all(parameter.is_meta for parameter in stored.layers[2].parameters())
    assert stored.ends == whole.ends


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_a_cut_computes_the_same_from_disk(family, layout, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family), seed=1)
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.5, layout, 3))
    write_model(checkpoint, plan, tmp_path / "cut")
    whole = load_cut(tmp_path / "cut", trust_remote_code=plan.custom_code)
    attention = checkpoint.geometry.family.attention
    stored = open_streaming(tmp_path / "cut", resolve(ON_CPU), 0, attention, trust_remote_code=plan.custom_code)
    with torch.inference_mode():
        assert stored(IDS).logits.equal(whole.model(IDS).logits)


def test_features_continuations_and_masked_logits_are_the_same(model):
    whole, stored = load(model, fingerprint=""), on_disk(model)
    assert np.array_equal(features(stored, PROMPTS, 16), features(whole, PROMPTS, 16))
    assert continued(stored, PROMPTS, 6) == continued(whole, PROMPTS, 6)
    for name in ("q_proj", "o_proj"):
        assert projection_weight(stored, 1, name).equal(projection_weight(whole, 1, name))
    gates = torch.ones(3, 8)
    gates[1, :3] = 0
    with torch.inference_mode(), head_gates(whole, gates), head_gates(stored, gates):
        assert stored.model(IDS).logits.equal(whole.model(IDS).logits)


@pytest.mark.parametrize("spread", [False, True], ids=["ours", "accelerate"])
@pytest.mark.parametrize(("mlp", "narrower"), [(False, False), (True, False), (False, True)])
def test_repairs_are_the_same_and_are_put_in_place(model, mlp, narrower, spread, tmp_path):
    whole = load(model, fingerprint="")
    stored = by_accelerate(model, tmp_path) if spread else on_disk(model, resident=1)
    kept = np.ones((3, 8), dtype=bool)
    kept[:, 2:4] = False
    channels = np.random.default_rng(0).random((3, whole.geometry.intermediate)) < 0.7
    units = Kept(kept, channels if narrower else None)
    found = []
    for loaded in (whole, stored):
        texts = with_continuations(loaded, PROMPTS, 2)
        (repair,) = fit_repairs(loaded, [units], texts, dtype=torch.float32, mlp=mlp)
        (flap,) = fit_biases(loaded, [units], texts, dtype=torch.float32)
        found.append((repair, flap))
    (one, bias), (other, other_bias) = found
    for layer in range(3):
        assert other.weights[layer].equal(one.weights[layer])
        assert other_bias.biases[layer].equal(bias.biases[layer])
        assert not (mlp or narrower) or other.down[layer].equal(one.down[layer])
    with torch.inference_mode():
        plain = whole.model(IDS).logits
        for repair in (one, bias):
            with masked(whole, units, repair):
                expected = whole.model(IDS).logits
            with masked(stored, units, repair):
                assert stored.model(IDS).logits.equal(expected)
            assert not expected.equal(plain) and stored.model(IDS).logits.equal(plain)


def by_accelerate(model, folder) -> LoadedModel:
    from transformers import AutoModelForCausalLM

    loaded = load(model, fingerprint="", placement=Placement(device="cpu", dtype="float32", device_map="auto"))
    options = {"device_map": "auto", "max_memory": {"cpu": 100_000}, "offload_folder": folder / "offload"}
    stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).requires_grad_(False).eval()
    object.__setattr__(loaded, "model", stored)
    assert o_proj(loaded.layers[2]).weight.is_meta
    return loaded


def test_what_is_replaced_outside_is_not_read_and_comes_back(model):
    stored = on_disk(model)
    projection, own = down_proj(stored.layers[0]), down_proj(stored.layers[0]).weight
    other = torch.zeros(64, 48)
    with replaced(projection, {"weight": other}), in_memory(stored.layers[0]):
        assert projection.weight.equal(other) and not o_proj(stored.layers[0]).weight.is_meta
    assert projection.weight is own and tensor_of(projection, "bias") is None


def test_a_layer_is_dropped_again_when_its_pass_fails(model):
    stored = on_disk(model)
    with pytest.raises(RuntimeError, match=r"shape|size|mat1"):
        stored.layers[1](torch.zeros(1, 2, 3))
    assert all(parameter.is_meta for parameter in stored.layers[1].parameters())


def test_as_many_layers_stay_as_the_limit_has_room_for(model):
    """64 and 48 are the sizes; work as `working_bytes` says: a batch forward, its logits, backward, and curvature."""
    tensors = Checkpoint(model).tensors
    layer = sum(4 * np.prod(info.shape) for name, info in tensors.items() if name.startswith("model.layers.0."))
    fixed = sum(4 * np.prod(info.shape) for name, info in tensors.items() if ".layers." not in name)
    band = 16 << 20  # of a tensor as it is stored, while it is read
    channels = Checkpoint(model).geometry.heads * Checkpoint(model).geometry.head_dim
    work = 4096 * (8 * 64 + 3 * 128) * 4 + 2 * 4096 * 260 * 4 + 1024 * 3 * 64 * 4 + 2 * 3 * channels**2 * 4

    def fits(memory: int, *, limited: bool = True) -> int | None:
        return layers_that_fit(model, Place(torch.device("cpu"), torch.float32, None, memory, limited, 1))

    assert fits(fixed + work + 3 * layer) == 3
    assert fits(fixed + work + 3 * layer - 1) == fits(fixed + layer + band) == 0
    assert fits(fixed + work + 3 * layer, limited=False) is None
    with pytest.raises(InputError, match="Give --memory"):
        fits(fixed + layer + band - 1)
    assert fits(1, limited=False) == 0  # nobody stated it: the system may swap


@pytest.mark.parametrize(("intermediate", "largest"), [(64, "curvature"), (20_000, "down_proj")])
def test_what_a_repair_solves_has_room_where_it_takes_more_than_a_backward_pass(intermediate, largest):
    g = geometry_of(family_config("llama", layers=2, hidden=64, kv_heads=4, group_size=2, head_dim=16).to_dict())
    g = changed(g, intermediate=intermediate)
    by_hand = {
        "curvature": 1024 * 2 * 64 * 4 + 2 * 2 * 128**2 * 4,
        "down_proj": 8 * intermediate * (intermediate + 64) + max(4 * intermediate**2, 16 * intermediate * 64),
    }
    batch = 4096 * (8 * 64 + 3 * intermediate) * 4 + 2 * 4096 * 260 * 4
    assert max(by_hand, key=by_hand.__getitem__) == largest
    assert working_bytes(g, 260, intermediate, 4) == batch + by_hand[largest]


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "accelerate"])
def test_of_two_weights_that_are_put_in_one_place_the_inner_one_counts(model, spread, tmp_path):
    place = o_proj((by_accelerate(model, tmp_path) if spread else load(model, fingerprint="")).layers[1])
    x, shape = torch.ones(1, place.in_features), (place.out_features, place.in_features)
    with torch.inference_mode():
        plain = place(x)
        with replaced(place, {"weight": torch.zeros(shape), "bias": torch.full(shape[:1], 2.0)}):
            with replaced(place, {"weight": torch.ones(shape)}):
                assert (place(x) == 2 + place.in_features).all()
            assert (place(x) == 2).all()
        assert place(x).equal(plain)


PEAK = """
import json, sys
from pathlib import Path
import torch
from sspcompile.bench.memory import peak_resident_bytes
from sspcompile.machine import resident_bytes
from sspcompile.model.capture import features
from sspcompile.model.loading import load
from sspcompile.model.placement import Placement
import transformers.models.llama.modeling_llama
before = resident_bytes()
memory = before + int(sys.argv[2]) if sys.argv[2] != "0" else None
loaded = load(Path(sys.argv[1]), fingerprint="", placement=Placement("cpu", "float32", memory=memory, threads=1))
found = features(loaded, ["What is 3 plus 4?"], 16)
print(json.dumps([peak_resident_bytes() - before, float(found.sum())]))
"""


def test_the_process_stays_below_its_limit(tmp_path):
    """A model of 150 MB in fp32, in less than half of that beside the work that a batch may need."""
    shape = Shape("llama", layers=24, hidden=512, kv_heads=8, group_size=2, head_dim=64, dtype=torch.bfloat16)
    model = make_checkpoint(tmp_path / "dense", shape)
    weights = sum(4 * int(np.prod(info.shape)) for info in Checkpoint(model).tensors.values())
    work = 4096 * (8 * 512 + 3 * 1024) * 4 + 2 * 4096 * 260 * 4
    limit = work + weights // 3
    peaks = []
    for memory in (0, limit):
        command = [sys.executable, "-P", "-c", PEAK, str(model), str(memory)]
        peaks.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    (whole, features_whole), (streamed, features_streamed) = peaks
    assert features_streamed == features_whole
    assert streamed < weights * 0.6 < weights < whole
