"""Whole layers: a cut without some of them is the masked model that passes them by, and budgets of them are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, family_config, make_checkpoint, save_random
from gguf import GGUFReader
from gguf_models import config_for, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_export_onnx import assert_same, export
from test_slicing_exact import IDS, PROMPTS, assert_equal_to_masked, mask_for, residual_error, without
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint
from sspcompile.criteria.block_influence import influence_of, state_distances
from sspcompile.errors import ArtifactError, BudgetError, ParityError
from sspcompile.export.card import slice_card
from sspcompile.export.gguf import publish
from sspcompile.export.gguf.publish import export_gguf
from sspcompile.families import FAMILIES, geometry_of, windows_of
from sspcompile.model.cache import cache_of
from sspcompile.model.journal import Journal, keeping
from sspcompile.model.llama_session import MODEL
from sspcompile.model.loading import load
from sspcompile.model.text import with_continuations
from sspcompile.progress import silent
from sspcompile.proof.claim import Claim, written_repair
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.prove import prove
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.request.options import Options
from sspcompile.request.sizes import size_text
from sspcompile.slicing.depth import any_layers, least_influence, least_runs, left_of
from sspcompile.slicing.mask import HeadMask, dump_mask, load_mask, parse_mask
from sspcompile.slicing.measures import Serving, at_most, memory_of, parameters_of
from sspcompile.slicing.plan import make_plan, plan_json
from sspcompile.slicing.write import write_model

PROBES = [IDS, IDS[:5], IDS[3:4]]
# Two that name the windows of their layers, one that leaves some without positions, one with experts in some.
BY_NUMBER = ("gemma3_text", "qwen2", "smollm3", "qwen3_moe")


def written(source: Path, out: Path, mask: HeadMask, **options) -> Claim:
    """The cut of a mask on disk, and what is claimed of it."""
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, out, **options)
    return Claim(checkpoint, mask, out, plan.custom_code, options.get("replaced", {}))


# --- The cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cut_without_layers_is_the_masked_model_in_its_stock_class(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, bias=True, layers=5), seed=1)
    removed = (0, 2, 3) if sorted(FAMILIES).index(family) % 2 else (1, 2, 4)
    claim = written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 0.5, "uniform", 3, 0.7), *removed))
    assert (
        not claim.custom_code and json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 2
    )
    check_contents(claim)
    assert_equal_to_masked(source, tmp_path / "cut", claim.mask, custom=False)
    assert compare_layerwise(claim, PROBES).relative < 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_layers_that_stay_may_differ(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, layers=4), seed=1)
    claim = written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 0.6, "per-layer", 3, 0.7), 0, 2))
    assert claim.custom_code and compare_layerwise(claim, PROBES).holds
    check_contents(claim)
    assert_equal_to_masked(source, tmp_path / "cut", claim.mask, custom=True)


@pytest.mark.parametrize("family", BY_NUMBER)
def test_what_a_configuration_says_by_number_is_said_of_the_layers_that_stay(family, tmp_path):
    """With and without the lists that newer versions write: patterns count layers of the dense model."""
    settings = {"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8} if family == "qwen2" else {}
    source = save_random(tmp_path / "dense", family_config(family, layers=6), seed=1)
    config = json.loads((source / "config.json").read_text()) | settings
    config |= {"no_rope_layer_interval": 3} if family == "smollm3" else {}
    config |= {"decoder_sparse_step": 1} if family == "qwen3_moe" else {}
    for key in ("layer_types", "no_rope_layers"):
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    claim = written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 1.0, "uniform", 3), 0, 3))
    said = json.loads((tmp_path / "cut" / "config.json").read_text())
    full, sliding = "full_attention", "sliding_attention"
    assert said["num_hidden_layers"] == 4
    if family == "gemma3_text":
        assert said["layer_types"] == [full, sliding, sliding, full] and "sliding_window_pattern" not in said
    if family == "qwen2":
        assert said["layer_types"] == [full, sliding, sliding, sliding] and said["max_window_layers"] == 1
    if family == "smollm3":
        assert said["no_rope_layers"] == [1, 0, 1, 0]
    if family == "qwen3_moe":
        assert said["mlp_only_layers"] == [0] and geometry_of(said).sparse == {1, 2, 3}
    assert_equal_to_masked(source, tmp_path / "cut", claim.mask, custom=False)


def test_tensors_of_layers_that_stay_are_copied_under_their_new_numbers(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4, dtype=torch.bfloat16, shard_bytes=20_000))
    written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 0, 2))
    dense, cut = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (source, tmp_path / "cut")
    )
    numbers = {"0": "1", "1": "3"}
    assert len(cut) < len(dense)
    for name, tensor in cut.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = numbers[parts[2]]
        assert tensor.view(torch.int16).equal(dense[".".join(parts)].view(torch.int16)), name


def test_sizes_of_a_plan_are_those_of_the_files_and_the_cache(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4, tied=True))
    checkpoint, mask = Checkpoint(source), without(mask_for(Checkpoint(source), 0.6, "per-layer", 2, 0.7), 0, 2)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    assert tensors.keys() == plan.tensors.keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.sliced.weight_bytes
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.sliced.parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=plan.custom_code)
    cache = cache_of(model(torch.tensor([IDS]), use_cache=True))
    assert sum(one.keys.nbytes + one.values.nbytes for one in cache.layers) == plan.sliced.kv_bytes_per_token * len(IDS)
    said = plan_json(plan, Serving(64, 1))
    assert said["removed_layers"] == [0, 2] and said["counts"][0] == [0, 0] and said["widths"][2] == 0
    assert {said["layers"][0][key]["sliced"] for key in ("parameters", "weight_bytes", "kv_bytes_per_token")} == {0}
    assert "with 2 of its 4 layers and " in slice_card(said, mask, {"source_name": "tiny"}, "cut")


def test_a_proof_finds_a_layer_in_the_wrong_place_and_one_too_many(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4))
    mask = without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 1)
    claim = written(source, tmp_path / "cut", mask)
    with pytest.raises(ParityError, match="is not what the mask leaves"):
        check_contents(replace(claim, mask=without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 2)))
    with pytest.raises(ParityError, match="output of layer 1 differs"):
        compare_layerwise(replace(claim, mask=without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 3)), PROBES)
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].clone()
    save_file(tensors, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"has model.layers.3.input_layernorm.weight, which the mask removes"):
        check_contents(claim)


# --- The mask --------------------------------------------------------------------------------------------------------


def test_masks_without_layers_are_read_back_and_others_are_written_as_before(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=4))
    whole = mask_for(Checkpoint(source), 0.6, "per-layer", 2, 0.7)
    mask = without(whole, 1, 3)
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    assert load_mask(tmp_path / "mask.json") == mask and mask.staying == (0, 2) and mask.units.removed == (1, 3)
    assert json.loads(dump_mask(mask))["schema_version"] == 3
    plain = json.loads(dump_mask(whole))
    assert plain["schema_version"] == 2 and "removed" not in plain and parse_mask(dump_mask(whole)) == whole


@pytest.mark.parametrize(
    ("removed", "empty", "problem"),
    [
        ((4,), (), "out of range"),
        ((2, 1), (1, 2), "unsorted"),
        ((1,), (), "layer 1 is removed and keeps"),
        ((0, 1, 2, 3), (0, 1, 2, 3), "every layer is removed"),
        ((1,), (1, 2), "layer 2 keeps no head"),
    ],
)
def test_masks_that_contradict_themselves_are_refused(removed, empty, problem, tmp_path):
    mask = mask_for(Checkpoint(make_checkpoint(tmp_path, Shape(layers=4))), 0.6, "uniform", 2)
    mask = replace(without(mask, *empty), removed=removed)
    with pytest.raises(ArtifactError, match=problem):
        parse_mask(dump_mask(mask))


# --- Repair ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of five layers that do not change much, and texts of its own."""
    source = make_checkpoint(tmp_path_factory.mktemp("tiny") / "dense", Shape(hidden=64, kv_heads=4, layers=5))
    loaded = load(source, fingerprint="")
    return source, loaded, with_continuations(loaded, PROMPTS, 4)


@pytest.mark.parametrize("removed", [(1, 2), (0,), (4,), (3,)])
def test_layers_around_removed_ones_are_refitted_and_come_closer(removed, tiny):
    source, loaded, batches = tiny
    kept = without(mask_for(Checkpoint(source), 1.0, "uniform", 0), *removed).units
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)
    front, behind = removed[0] - 1, set(range(removed[-1] + 1, 5))
    assert set(repair.down) == ({front} if front >= 0 else set())
    assert set(repair.weights) == behind
    assert residual_error(loaded, kept, batches, repair) < 0.9 * residual_error(loaded, kept, batches, None)
    (biases,) = fit_biases(loaded, [kept], batches, dtype=torch.float32)
    assert not biases.biases


def test_a_repaired_cut_without_layers_equals_its_oracle(tiny, tmp_path):
    source, loaded, batches = tiny
    mask = without(mask_for(Checkpoint(source), 0.6, "uniform", 0, 0.7), 1, 3)
    (repair,) = fit_repairs(loaded, [mask.units], batches, dtype=torch.float32)
    claim = written(source, tmp_path / "cut", mask, replaced=repair.replaced(mask.units, loaded.geometry))
    read_back = written_repair(claim)
    for fitted, found in ((repair.weights, read_back.weights), (repair.down, read_back.down)):
        assert fitted.keys() == found.keys() and not fitted.keys() & {1, 3}
        assert all(weight.equal(found[layer]) for layer, weight in fitted.items())
    assert compare_layerwise(claim, PROBES).holds
    assert prove(claim, PROBES, silent, layerwise=False).holds


def test_an_interrupted_repair_goes_on_behind_removed_layers(tiny, tmp_path):
    source, loaded, batches = tiny
    masks = [without(mask_for(Checkpoint(source), 1.0, "uniform", 0), *removed).units for removed in ((0,), (1, 2))]
    demand_resumed(loaded, masks, batches, tmp_path)


def demand_resumed(loaded, masks, batches, folder: Path) -> None:
    """An interrupted fit of masks goes on to the bits of one that was not."""
    whole = [*fit_repairs(loaded, masks, batches, dtype=torch.float32)]

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), keeping(Journal(folder, every=0)):
        list(fit_repairs(loaded, masks, batches, dtype=torch.float32, progress=stop))
    with keeping(Journal(folder, every=0)):
        again = [*fit_repairs(loaded, masks, batches, dtype=torch.float32)]
    for one, other in zip(whole, again, strict=True):
        for mine, theirs in ((one.weights, other.weights), (one.down, other.down)):
            assert mine.keys() == theirs.keys() and all(mine[layer].equal(theirs[layer]) for layer in mine)
        assert one.experts.keys() == other.experts.keys()
        for layer, own in one.experts.items():
            assert own.keys() == other.experts[layer].keys()
            assert all(weight.equal(other.experts[layer][number]) for number, weight in own.items())


# --- Which ones ------------------------------------------------------------------------------------------------------


def test_influence_is_one_minus_the_cosine_of_input_and_output(tiny):
    _, loaded, batches = tiny
    found = state_distances(loaded, batches)
    seen: list[list[torch.Tensor]] = []
    for batch in batches:
        with torch.inference_mode():
            output = loaded.model.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            )
        real = batch.attention_mask.bool()
        seen.append([state[real].double() for state in output.hidden_states])
    states = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    for one, other in ((0, 1), (1, 2), (1, 4), (3, 4)):  # transformers norms the last state
        cosine = torch.cosine_similarity(states[one], states[other], dim=-1).mean()
        assert found[one, other] == pytest.approx(1 - float(cosine), abs=1e-5) == found[other, one]
    assert np.abs(np.diagonal(found)).max() < 1e-5
    assert influence_of(found)[1] == found[1, 2] and len(influence_of(found)) == 5


def test_a_layer_that_writes_nothing_has_no_influence_and_goes_first(tmp_path):
    loaded = load(make_checkpoint(tmp_path, Shape(layers=4)), fingerprint="")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        loaded.layers[2].get_submodule(name).weight.data.zero_()
    g, batches = loaded.geometry, with_continuations(loaded, PROMPTS[:4], 2)
    found = state_distances(loaded, batches)
    measure = parameters_of(g)
    choice = least_influence(influence_of(found), g, (at_most(measure, measure.whole - 1, "--max-params"),))
    assert choice.units.removed == (2,)
    runs = [*least_runs(found, g, (at_most(measure, measure.whole - 1, "--max-params"),))]
    assert runs[0].units.removed == (2,) and len(runs) == 4


@settings(max_examples=60)
@given(
    family=st.sampled_from(["llama", "gemma2", "qwen3_moe", "starcoder2"]),
    layers=st.integers(1, 7),
    share=st.floats(0, 1),
    memory=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_budget_is_kept_and_no_layer_that_went_could_have_stayed(
    family, layers, share, memory, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text(json.dumps(family_config(family, layers=layers).to_dict()))
    checkpoint = Checkpoint(folder)
    g = checkpoint.geometry
    measure = memory_of(checkpoint, Serving(300, 2)) if memory else parameters_of(g)
    least = min(left_of(measure, one) for one in np.eye(layers, dtype=bool))
    bounds = (at_most(measure, least + round(share * (measure.whole - least)), "--max-params"),)
    rng = np.random.default_rng(seed)
    distances = rng.random((layers + 1, layers + 1))
    alone = least_influence(influence_of(distances), g, bounds)
    for choice in (alone, any_layers(g, bounds), *least_runs(distances, g, bounds)):
        staying = choice.layers
        assert measure.kept(g, choice.shapes) == left_of(measure, staying) <= bounds[0].most
        assert choice.kept[staying].all() and not choice.kept[~staying].any()
    for layer in alone.units.removed:
        assert left_of(measure, alone.layers | (np.arange(layers) == layer)) > bounds[0].most
    typed = size_text(least) if memory else str(least)
    with pytest.raises(BudgetError, match=f"nearest feasible value is --max-params {typed}|one layer") as refused:
        least_influence(influence_of(distances), g, (at_most(measure, least - 1, "--max-params"),))
    assert refused.value.hint == f"The nearest feasible value is --max-params {typed}."


@pytest.mark.parametrize(
    "given",
    [{"keep": 0.5}, {"strength": 0.5}, {"size": 0.9, "criterion": "wanda"}, {"size": 0.9, "layout": "per-layer"}],
)
def test_what_is_about_parts_of_layers_is_refused_beside_whole_ones(given):
    with pytest.raises(ValueError, match=f"units layers removes whole layers, and {[*given][-1]}"):
        Options(units="layers", **given)
    assert Options(units="layers", max_params="1M", importance_from="prompts").whole == "layers"


# --- A build ---------------------------------------------------------------------------------------------------------

FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--repair", "none", "--quiet")


def test_a_build_removes_whole_layers_and_says_so_everywhere(
    run, toolkits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    toolkits.put(tmp_path, max_tokens=48, continuation_tokens=4)
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--units", "layers", "--size", 0.8)
    code, _, err = run("build", "--scenario", "finance-desk", *words, "--out", "cut", *FAST)
    assert code == 0, err
    mask, plan, report = (
        json.loads((tmp_path / "cut" / name).read_text()) for name in ("mask.json", "plan.json", "report.json")
    )
    removed = mask["removed"]
    assert removed and plan["removed_layers"] == report["mask"]["removed"] == removed
    planned = json.loads(run("plan", *words, "--json")[1])
    assert planned["parameters"] == plan["parameters"] and len(planned["removed_layers"]) == len(removed)
    assert 0.8 - 1 / 8 < plan["parameters"]["sliced"] / plan["parameters"]["dense"] <= 0.8
    assert not plan["custom_code"] and mask["criterion"].startswith("block-influence")
    assert len(mask["scenario"]["tried"]) > 1
    assert report["layout"]["reason"] == "layers that stay whole have one shape"
    assert {row["name"] for row in report["quality"]} >= {"this build", "random layers, first layer kept"}
    assert (
        "layer removed" in run("inspect", "cut")[1] and "removed whole" in (tmp_path / "cut" / "mask.svg").read_text()
    )
    assert "Removed whole: layer" in (tmp_path / "cut" / "report.md").read_text()
    assert f"{len(removed)} of its 8 layers" in (tmp_path / "cut" / "model" / "README.md").read_text()
    assert run("verify", "cut", "--layerwise")[0] == 0


def test_budgets_that_leave_no_layer_exit_with_3(run):
    code, out, err = run("plan", "--units", "layers", "--size", 0.01, "--json")
    assert code == 3 and out == "" and "with one layer" in err
    named = err.split("--size ")[-1].strip().rstrip(".")
    found = json.loads(run("plan", "--units", "layers", "--size", named, "--json")[1])
    assert len(found["removed_layers"]) == 7 and {one["layout"] for one in found["frontier"]["points"]} == {"uniform"}
    code, _, err = run("plan", "--units", "layers", "--keep", 0.5)
    assert code == 2 and "keep 0.5 is about parts" in err


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_onnx_exports_of_a_cut_without_layers(precision, tmp_path):
    source = save_random(tmp_path / "dense", family_config("smollm3", layers=5), seed=1)
    written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 0, 3))
    export(tmp_path / "cut", tmp_path / "onnx", precision)
    if precision == "fp32":
        assert_same(tmp_path / "cut", tmp_path / "onnx", [IDS, IDS[:5]])


def test_a_gguf_states_the_layers_that_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "has_llama_cpp", lambda: False)
    source = dense(tmp_path / "dense", config_for("gemma3_text"))
    claim = written(source, tmp_path / "cut", without(mask_for(Checkpoint(source), 1.0, "uniform", 0), 0))
    windows = windows_of(claim.checkpoint.config, claim.geometry.family, 4)
    asked = {"kind": None, "probes": [[1]], "origin": {}, "trust_remote_code": False}
    export_gguf(tmp_path / "cut", tmp_path / "gguf", card=lambda _: "", **asked)
    read = GGUFReader(tmp_path / "gguf" / MODEL)
    assert read.fields["gemma3.block_count"].contents() == 3
    pattern = read.fields["gemma3.attention.sliding_window_pattern"].contents()
    assert pattern == [windows[layer] is not None for layer in claim.mask.staying]
    assert {one.name.split(".")[1] for one in read.tensors if one.name.startswith("blk.")} == {"0", "1", "2"}
