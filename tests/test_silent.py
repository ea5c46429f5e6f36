"""Layers without attention: a cut that keeps their MLPs is the masked model, its sizes are exact, its cache works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, family_config, make_checkpoint, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_export_onnx import assert_same, export, genai_text
from test_layers import PROBES, written
from test_slicing_exact import (
    IDS,
    PROMPTS,
    assert_equal_to_masked,
    mask_for,
    residual_error,
    without,
    without_attention,
)
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import ArtifactError, InputError, ParityError, UnsupportedModelError
from sspcompile.export.gguf.source import read_source
from sspcompile.families import FAMILIES
from sspcompile.model.cache import cache_of
from sspcompile.model.decoder import TextModel
from sspcompile.model.journal import Journal, keeping
from sspcompile.model.loading import load, load_cut
from sspcompile.model.onnx_session import OnnxModel
from sspcompile.model.placement import ON_CPU, resolve
from sspcompile.model.streaming import open_streaming
from sspcompile.model.text import with_continuations
from sspcompile.progress import silent
from sspcompile.proof.claim import Claim, written_repair
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.prove import prove
from sspcompile.proof.reload import respond
from sspcompile.repair.fitting import fit_biases, fit_repairs
from sspcompile.repair.repair import masked
from sspcompile.slicing.layouts import SILENT
from sspcompile.slicing.mask import dump_mask, parse_mask
from sspcompile.slicing.measures import Serving, memory_of, parameters_of
from sspcompile.slicing.plan import make_plan, plan_json


def cut_of(source: Path, out: Path, *gone: int, keep: float = 0.6, width: float = 0.7) -> Claim:
    """A cut in which those layers have no attention, and the others fewer heads."""
    return written(source, out, without_attention(mask_for(Checkpoint(source), keep, "per-layer", 3, width), *gone))


# --- The cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cut_without_attention_in_layers_is_the_masked_model(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, bias=True, layers=5), seed=1)
    gone = (0, 1, 3) if sorted(FAMILIES).index(family) % 2 else (2, 4)
    claim = cut_of(source, tmp_path / "cut", *gone)
    check_contents(claim)
    assert_equal_to_masked(source, tmp_path / "cut", claim.mask, custom=True)
    assert compare_layerwise(claim, PROBES).relative < 1e-12


@pytest.mark.parametrize("gone", [(0, 1), (2,), (0, 2, 5), (0, 1, 3, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("listed", [True, False])
def test_a_cache_holds_windows_whichever_attention_is_gone(gone, listed, tmp_path):
    """Every third layer sees all, and the first and the last of a kind may be gone, or all of a kind."""
    source = save_random(tmp_path / "dense", family_config("gemma3_text", layers=6), seed=1)
    config = json.loads((source / "config.json").read_text()) | {"sliding_window_pattern": 3, "sliding_window": 8}
    config["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    if not listed:
        del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config))
    claim = cut_of(source, tmp_path / "cut", *gone, width=1.0)
    assert_equal_to_masked(source, tmp_path / "cut", claim.mask, custom=True)
    assert compare_layerwise(claim, PROBES).holds


def test_whole_layers_may_go_beside_the_attention_of_others(tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen3", layers=5), seed=1)
    mask = without(without_attention(mask_for(Checkpoint(source), 0.6, "per-layer", 3, 0.7), 0, 3), 1)
    claim = written(source, tmp_path / "cut", mask)
    assert mask.silent == (0, 3) and mask.units.silent == (0, 3) and mask.staying == (0, 2, 3, 4)
    check_contents(claim)
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=True)
    said = json.loads((tmp_path / "cut" / "config.json").read_text())["per_layer_config"]
    assert [said[str(n)]["num_attention_heads"] == 0 for n in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_rows_of_a_padded_batch_are_continued_as_by_the_masked_model(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, layers=4), seed=1)
    claim = cut_of(source, tmp_path / "cut", 0, 2, width=1.0)
    dense = load(source, fingerprint="")
    cut = load_cut(tmp_path / "cut", trust_remote_code=True)
    ids = torch.tensor([IDS[:9], [0] * 4 + IDS[2:7], [0] * 8 + IDS[3:4]])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]])
    assert isinstance(cut, TextModel)
    with masked(dense, claim.mask.units):
        expected = dense.continuations(ids, mask, 10)
    assert cut.continuations(ids, mask, 10) == expected


def test_it_survives_saving_attention_switching_static_cache_and_beams(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="qwen3", layers=4, kv_heads=4))
    cut_of(source, tmp_path / "cut", 0, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert again(ids).logits.equal(expected)
        again.set_attn_implementation("eager")
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)
    plain = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    dynamic, static = (model.generate(ids, **plain, **more) for more in ({}, {"cache_implementation": "static"}))
    assert dynamic.equal(static) and model.generate(ids, **plain, num_beams=3).shape == dynamic.shape


def test_layers_without_attention_are_streamed_from_disk(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4, kv_heads=4))
    claim = cut_of(source, tmp_path / "cut", 0, 3)
    whole = load_cut(tmp_path / "cut", trust_remote_code=True)
    attention = claim.geometry.family.attention
    stored = open_streaming(tmp_path / "cut", resolve(ON_CPU), 0, attention, trust_remote_code=True)
    with torch.inference_mode():
        for ids in ([IDS], [IDS[:3]]):
            found, expected = (respond(model, ids, 4) for model in (stored, whole.model))
            assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    assert prove(claim, PROBES, silent, layerwise=False).holds


@pytest.mark.parametrize("gone", [(0, 2), (1, 4)])
@pytest.mark.parametrize("family", ["llama", "smollm3", "granite", "qwen3", "phi3", "qwen2"])
def test_onnx_graphs_have_no_cache_where_there_is_no_attention(family, gone, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, layers=5), seed=1)
    cut_of(source, tmp_path / "cut", *gone)
    export(tmp_path / "cut", tmp_path / "onnx", "fp32")
    assert_same(tmp_path / "cut", tmp_path / "onnx", [IDS, IDS[:5]])
    caches = set(OnnxModel.open(tmp_path / "onnx").cache_shapes(1, 1))
    assert caches == {f"past_key_values.{n}.{part}" for n in range(3) for part in ("key", "value")}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_rounded_onnx_graphs_of_a_cut_without_attention_in_layers(precision, tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen3", layers=4), seed=1)
    cut_of(source, tmp_path / "cut", 0, 2)
    export(tmp_path / "cut", tmp_path / "onnx", precision)


def test_genai_writes_the_same_text(tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama", layers=4), seed=1)
    cut_of(source, tmp_path / "cut", 0, 2)
    export(tmp_path / "cut", tmp_path / "onnx", "fp32")
    ids = torch.tensor([IDS[:8]])
    expected = load_cut(tmp_path / "cut", trust_remote_code=True).continuations(ids, torch.ones_like(ids), 20)
    assert [genai_text(tmp_path / "onnx", IDS[:8], 20)] == expected


def test_a_gguf_is_refused_in_words_before_anything_is_written(tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama", layers=3), seed=1)
    claim = cut_of(source, tmp_path / "cut", 1)
    with pytest.raises(UnsupportedModelError, match="layers without attention were not tried") as refused:
        read_source(tmp_path / "cut")
    assert refused.value.hint == "Use --format onnx or hf."
    said = {one.runtime: one for one in make_plan(claim.checkpoint, claim.mask).runtimes}
    assert not said["llama.cpp"].loads and "without attention" in said["llama.cpp"].reason
    assert said["ONNX Runtime"].loads


# --- Sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_of_a_plan_are_those_of_the_files_and_the_cache(tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen3", bias=True, layers=4), seed=1)
    claim = cut_of(source, tmp_path / "cut", 0, 2)
    plan = make_plan(claim.checkpoint, claim.mask)
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    assert tensors.keys() == plan.tensors.keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.sliced.weight_bytes
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.sliced.parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    cache = cache_of(model(torch.tensor([IDS]), use_cache=True))
    held = [one for one in cache.layers if one.is_initialized]
    assert len(held) == 2
    assert sum(one.keys.nbytes + one.values.nbytes for one in held) == plan.sliced.kv_bytes_per_token * len(IDS)
    said = plan_json(plan, Serving(64, 1))
    assert said["removed_attention"] == [0, 2] and "removed_layers" not in said
    assert said["counts"][0] == [0, 0] and said["widths"][0] > 0
    assert said["layers"][0]["kv_bytes_per_token"]["sliced"] == said["layers"][0]["flops_per_position"]["sliced"] == 0
    assert not next(one for one in plan.runtimes if one.runtime == "vLLM").loads


@settings(max_examples=40)
@given(
    family=st.sampled_from(["llama", "gemma2", "qwen3_moe", "starcoder2", "phi3", "qwen3"]),
    gone=st.sets(st.integers(0, 4), min_size=1, max_size=4),
    removed=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_what_a_budget_counts_is_what_the_plan_has(family, gone, removed, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text(json.dumps(family_config(family, bias=True, layers=5).to_dict()))
    checkpoint = Checkpoint(folder)
    mask = without_attention(mask_for(checkpoint, 0.6, "per-layer", seed, 0.7), *gone)
    mask = mask if {*range(5)} - gone == {removed} else without(mask, removed)
    plan, g, serving = make_plan(checkpoint, mask), checkpoint.geometry, Serving(300, 2)
    shapes = [layer.shape for layer in plan.layers]
    assert (SILENT in shapes) == bool(gone - {*mask.removed})
    if plan.host is g.family:
        assert parameters_of(g).kept(g, shapes, plan.widths) == plan.sliced.parameters
        assert memory_of(checkpoint, serving).kept(g, shapes, plan.widths) == plan.memory(serving)[1]


# --- The proof -------------------------------------------------------------------------------------------------------


def test_a_proof_finds_an_attention_too_many_and_one_in_the_wrong_place(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4))
    claim = cut_of(source, tmp_path / "cut", 1)
    other = replace(claim, mask=without_attention(mask_for(Checkpoint(source), 0.6, "per-layer", 3, 0.7), 2))
    with pytest.raises(ParityError, match=r"layers\.2\.(input|self_attn).*which the mask removes"):
        check_contents(other)
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(8)
    save_file(tensors, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"has model.layers.1.self_attn.q_proj.bias, which the mask removes"):
        check_contents(claim)


def test_masks_without_attention_are_read_back_and_impossible_ones_refused(tmp_path):
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "dense", Shape(layers=3)))
    mask = without_attention(mask_for(checkpoint, 0.6, "per-layer", 3, 0.7), 0, 2)
    assert parse_mask(dump_mask(mask)) == mask
    for wrong, problem in (
        (without_attention(mask, 0, 1, 2), "no layer keeps a head"),
        (without(mask, 1), "no layer keeps a head"),
        (replace(mask, layout="uniform"), "layer 0 keeps no head"),
    ):
        with pytest.raises(ArtifactError, match=problem):
            make_plan(checkpoint, wrong)
    with pytest.raises(InputError, match="--host llama is for uniform cuts"):
        make_plan(checkpoint, mask, host="llama")


# --- Repair ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of five layers, and texts of its own."""
    source = make_checkpoint(tmp_path_factory.mktemp("tiny") / "dense", Shape(hidden=64, kv_heads=4, layers=5))
    loaded = load(source, fingerprint="")
    return source, loaded, with_continuations(loaded, PROMPTS, 4)


@pytest.mark.parametrize("gone", [(0,), (1, 2), (4,)])
def test_the_mlp_of_a_layer_without_attention_makes_up_for_it(gone, tiny):
    source, loaded, batches = tiny
    kept = without_attention(mask_for(Checkpoint(source), 1.0, "per-layer", 0), *gone).units
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)
    assert set(repair.down) == {*gone} and set(repair.weights) == {*range(gone[0], 5)} - {*gone}
    assert residual_error(loaded, kept, batches, repair) < 0.9 * residual_error(loaded, kept, batches, None)
    (biases,) = fit_biases(loaded, [kept], batches, dtype=torch.float32, anywhere=True)
    assert not biases.biases


def test_a_repaired_cut_equals_its_oracle(tiny, tmp_path):
    source, loaded, batches = tiny
    mask = without_attention(mask_for(Checkpoint(source), 0.6, "per-layer", 0, 0.7), 1, 3)
    (repair,) = fit_repairs(loaded, [mask.units], batches, dtype=torch.float32)
    claim = written(source, tmp_path / "cut", mask, replaced=repair.replaced(mask.units, loaded.geometry))
    read_back = written_repair(claim)
    for fitted, found in ((repair.weights, read_back.weights), (repair.down, read_back.down)):
        assert fitted.keys() == found.keys()
        assert all(weight.equal(found[layer]) for layer, weight in fitted.items())
    assert all(prove(claim, PROBES, silent, layerwise=way).holds for way in (False, True))


def test_experts_have_nothing_to_make_up_with_and_later_attention_is_refitted(tmp_path):
    source = save_random(tmp_path / "dense", family_config("mixtral", layers=3), seed=1)
    loaded, mask = load(source, fingerprint=""), without_attention(mask_for(Checkpoint(source), 1.0, "per-layer", 0), 0)
    batches = with_continuations(loaded, PROMPTS[:6], 2)
    (repair,) = fit_repairs(loaded, [mask.units], batches, dtype=torch.float32)
    assert not repair.down and set(repair.weights) == {1, 2}
    claim = written(source, tmp_path / "cut", mask, replaced=repair.replaced(mask.units, loaded.geometry))
    assert compare_layerwise(claim, PROBES).holds


def test_an_interrupted_repair_goes_on_behind_attention_that_is_gone(tiny, tmp_path):
    source, loaded, batches = tiny
    masks = [without_attention(mask_for(Checkpoint(source), 1.0, "per-layer", 0), *gone).units for gone in ((0,), (1,))]
    whole = [*fit_repairs(loaded, masks, batches, dtype=torch.float32)]

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), keeping(Journal(tmp_path, every=0)):
        list(fit_repairs(loaded, masks, batches, dtype=torch.float32, progress=stop))
    with keeping(Journal(tmp_path, every=0)):
        again = [*fit_repairs(loaded, masks, batches, dtype=torch.float32)]
    for one, other in zip(whole, again, strict=True):
        for mine, theirs in ((one.weights, other.weights), (one.down, other.down)):
            assert mine.keys() == theirs.keys() and all(mine[layer].equal(theirs[layer]) for layer in mine)


def test_heads_alone_are_no_reason_to_lose_an_attention(tiny):
    """A layer whose heads all stay is not silent, nor is one that is removed whole."""
    source, _, _ = tiny
    whole = mask_for(Checkpoint(source), 1.0, "per-layer", 0)
    assert whole.silent == whole.units.silent == () == without(whole, 1).units.silent
    assert np.array_equal(without(whole, 1).units.heads.any(1), [True, False, True, True, True])
