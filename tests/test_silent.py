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
from test_layers import PROBES, demand_resumed, written
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

from sspcompile.bench.memory import kv_bytes_per_token
from sspcompile.bench.step_times import step_seconds
from sspcompile.checkpoint import Checkpoint
from sspcompile.criteria.block_influence import attention_influence
from sspcompile.errors import ArtifactError, BudgetError, InputError, ParityError, UnsupportedModelError
from sspcompile.export.gguf.source import read_source
from sspcompile.families import FAMILIES
from sspcompile.model.cache import cache_of
from sspcompile.model.decoder import TextModel
from sspcompile.model.hooks import input_of
from sspcompile.model.loading import load, load_cut
from sspcompile.model.modules import residual_norm
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
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import masked
from sspcompile.request.options import Options
from sspcompile.request.sizes import size_text
from sspcompile.slicing.depth import any_layers, least_influence, left_of, shallowest
from sspcompile.slicing.layouts import SILENT
from sspcompile.slicing.mask import dump_mask, parse_mask
from sspcompile.slicing.measures import Serving, at_most, memory_of, parameters_of
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
    assert kv_bytes_per_token(cache) == plan.sliced.kv_bytes_per_token
    assert step_seconds(model, Serving(8, 2), torch.device("cpu")) > 0
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
    assert json.loads(dump_mask(mask))["schema_version"] == 4, "a reader that knows less would keep a silent head"
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
    demand_resumed(loaded, masks, batches, tmp_path)


def test_heads_alone_are_no_reason_to_lose_an_attention(tiny):
    """A layer whose heads all stay is not silent, nor is one that is removed whole."""
    source, _, _ = tiny
    whole = mask_for(Checkpoint(source), 1.0, "per-layer", 0)
    assert whole.silent == whole.units.silent == () == without(whole, 1).units.silent
    assert np.array_equal(without(whole, 1).units.heads.any(1), [True, False, True, True, True])


# --- Which ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_influence_is_one_minus_the_cosine_around_the_attention(family, tmp_path):
    loaded = load(save_random(tmp_path, family_config(family, layers=3), seed=1), fingerprint="")
    batches = with_continuations(loaded, PROMPTS[:6], 2)
    found = attention_influence(loaded, batches)
    for layer in range(3):
        pairs = []
        for batch in batches:
            with (
                torch.inference_mode(),
                input_of(loaded.layers[layer], "layer") as before,
                input_of(residual_norm(loaded.layers[layer]), "residual norm") as behind,
            ):
                loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            real = batch.attention_mask.bool()
            pairs.append((before[0][real].double(), behind[0][real].double()))
        cosines = torch.cat([torch.cosine_similarity(*pair, dim=-1) for pair in pairs])
        assert found[layer] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


def test_an_attention_that_writes_nothing_has_no_influence_and_goes_first(tmp_path):
    loaded = load(make_checkpoint(tmp_path, Shape(layers=4)), fingerprint="")
    loaded.layers[2].get_submodule("self_attn.o_proj").weight.data.zero_()
    found = attention_influence(loaded, with_continuations(loaded, PROMPTS[:4], 2))
    assert found.argmin() == 2 and found[2] < 1e-6
    g, measure = loaded.geometry, parameters_of(loaded.geometry)
    choice = least_influence(found, g, (at_most(measure, measure.whole - 1, "--max-params"),), "attention")
    assert choice.units.silent == (2,) and choice.units.removed == () and choice.channels is None


@settings(max_examples=60)
@given(
    family=st.sampled_from(["llama", "gemma2", "qwen3_moe", "starcoder2"]),
    layers=st.integers(1, 7),
    share=st.floats(0, 1),
    memory=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_budget_is_kept_and_no_attention_that_went_could_have_stayed(
    family, layers, share, memory, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text(json.dumps(family_config(family, layers=layers).to_dict()))
    checkpoint = Checkpoint(folder)
    g = checkpoint.geometry
    measure = memory_of(checkpoint, Serving(300, 2)) if memory else parameters_of(g)
    least = min(left_of(measure, one, "attention") for one in np.eye(layers, dtype=bool))
    assert least == shallowest(measure, "attention")
    bounds = (at_most(measure, least + round(share * (measure.whole - least)), "--max-params"),)
    influence = np.random.default_rng(seed).random(layers)
    alone = least_influence(influence, g, bounds, "attention")
    for choice in (alone, any_layers(g, bounds, "attention")):
        staying = choice.kept.all(1)
        assert measure.kept(g, choice.shapes) == left_of(measure, staying, "attention") <= bounds[0].most
        assert not choice.kept[~staying].any()
    for layer in alone.units.silent:
        staying = alone.kept.all(1) | (np.arange(layers) == layer)
        assert left_of(measure, staying, "attention") > bounds[0].most
    with pytest.raises(BudgetError, match="attention of one layer") as refused:
        least_influence(influence, g, (at_most(measure, least - 1, "--max-params"),), "attention")
    typed = size_text(least) if memory else str(least)
    assert refused.value.hint == f"The nearest feasible value is --max-params {typed}."


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep": 0.5}, "removes the whole attention of layers, and keep 0.5 is about parts"),
        ({"nested": "0.9,0.8"}, "nested 1,0.9,0.8 is about parts"),
        ({"size": 0.9, "criterion": "wanda"}, "criterion wanda is about parts"),
        ({"size": 0.9, "layout": "uniform"}, "layout uniform has not; leave it out"),
        (
            {"max_latency": "5ms"},
            "no price of attention as a whole.*give size, max_params, max_memory, max_perplexity or max_loss",
        ),
    ],
)
def test_what_whole_attention_cannot_be_asked_for_is_refused_in_words(given, told):
    with pytest.raises(ValueError, match=told):
        Options(units="attention", **given)
    assert Options(units="attention", max_params="1M", layout="per-layer").whole == "attention"
    assert Options(units="attention").max_loss is not None


# --- A build ---------------------------------------------------------------------------------------------------------

FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--quiet")


def test_a_build_removes_whole_attention_and_says_so_everywhere(
    run, toolkits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    toolkits.put(tmp_path, max_tokens=48, continuation_tokens=4)
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--units", "attention", "--size", 0.9)
    code, _, err = run("build", "--scenario", "finance-desk", *words, "--out", "cut", *FAST)
    assert code == 0, err
    mask, plan, report = (
        json.loads((tmp_path / "cut" / name).read_text()) for name in ("mask.json", "plan.json", "report.json")
    )
    gone = plan["removed_attention"]
    assert gone == [layer for layer, row in enumerate(mask["kept"]) if not row] and "removed" not in mask
    assert all(len(row) in (0, mask["heads"]) for row in mask["kept"]) and mask["channels"] is None
    planned = json.loads(run("plan", *words, "--json")[1])
    assert planned["parameters"] == plan["parameters"] and len(planned["removed_attention"]) == len(gone)
    assert {one["layout"] for one in planned["frontier"]["points"]} == {"per-layer"}
    assert plan["parameters"]["sliced"] <= 0.9 * plan["parameters"]["dense"]
    assert plan["custom_code"] and mask["criterion"] == "attention-influence" and mask["layout"] == "per-layer"
    assert report["layout"]["reason"] == "layers with and without attention differ"
    assert {row["name"] for row in report["quality"]} >= {"this build", "random attention, first layer kept"}
    page = (tmp_path / "cut" / "report.md").read_text()
    assert "Attention removed, MLP kept: layer" in page and f"the attention of {len(gone)} is gone (layer" in page
    assert f"All heads of {8 - len(gone)} of 8 layers are kept" in page
    assert "attention removed" in run("inspect", "cut")[1]
    assert "attention removed" in (tmp_path / "cut" / "mask.svg").read_text()
    assert f"the whole attention of {len(gone)} layer" in (tmp_path / "cut" / "model" / "README.md").read_text()
    assert run("verify", "cut", "--layerwise")[0] == 0
    code, _, err = run("export", "cut", "--format", "gguf")
    assert code != 0 and "layers without attention were not tried" in err


def test_budgets_that_leave_no_attention_exit_with_3(run):
    code, out, err = run("plan", "--units", "attention", "--size", 0.01, "--json")
    assert code == 3 and out == "" and "with the attention of one layer" in err
    named = err.split("--size ")[-1].strip().rstrip(".")
    assert len(json.loads(run("plan", "--units", "attention", "--size", named, "--json")[1])["removed_attention"]) == 7
    code, _, err = run("plan", "--units", "attention", "--keep", 0.5)
    assert code == 2 and "keep 0.5 is about parts" in err


@pytest.mark.parametrize("units", ["attention", "layers"])
def test_a_bias_that_nothing_could_hold_is_refused_before_any_work(run, units):
    code, _, err = run("plan", "-s", "homework-tutor", "--units", units, "--size", "0.8", "--repair", "flap-bias")
    assert code == 2 and "flap-bias" in err and "least-squares" in err and err.count("\n") == 1
