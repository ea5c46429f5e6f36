"""Channels of experts: a cut of them is the masked model, their scores are those of gates, and budgets of them hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import expert_config, save_random, stated
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_curvature import information_of_gates
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.checkpoint.tensors import down_names
from sspcompile.criteria import fisher
from sspcompile.criteria.curvature import curvature
from sspcompile.criteria.units import CriterionInput
from sspcompile.errors import ArtifactError, ParityError
from sspcompile.export.card import slice_card
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.experts import one_by_one
from sspcompile.model.gradients import state_gradients
from sspcompile.model.loading import load, load_cut
from sspcompile.model.logits import decoder_output
from sspcompile.model.modules import experts
from sspcompile.model.placement import ON_CPU, resolve
from sspcompile.model.streaming import open_streaming
from sspcompile.model.text import batches_of, continued, with_continuations
from sspcompile.progress import silent
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.prove import prove
from sspcompile.repair.repair import masked
from sspcompile.report.json import read_report
from sspcompile.slicing.mask import HeadMask, dump_mask, load_mask, parse_mask
from sspcompile.slicing.measures import Serving
from sspcompile.slicing.plan import make_plan, plan_json
from sspcompile.slicing.sizes import EXPERT_STEP, Counts, Worth, channel_step, even_worth, realised

FAMILIES = ("mixtral", "qwen3_moe")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory) -> Path:
    """Three layers; three experts of 48 channels each, or four of 24."""
    return save_random(tmp_path_factory.mktemp(request.param) / "dense", expert_config(request.param), seed=1)


@pytest.fixture
def mask(dense) -> HeadMask:
    return mask_for(Checkpoint(dense), 0.6, "per-layer", 3, 0.7)


# --- The cut ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    keep=st.floats(0.2, 1.0),
    width=st.sampled_from([0.4, 0.7]),
    layout=st.sampled_from(["uniform", "per-layer"]),
    gone=st.sets(st.integers(0, 2), max_size=1),
    silent_layers=st.sets(st.integers(0, 2), max_size=1),
    seed=st.integers(0, 99),
)
def test_a_cut_of_experts_is_the_masked_model(dense, tmp_path_factory, keep, width, layout, gone, silent_layers, seed):
    out = tmp_path_factory.mktemp("cut") / "cut"
    mask = mask_for(Checkpoint(dense), keep, layout, seed, width)
    mask = without(mask, *gone)
    mask = without_attention(mask, *(silent_layers - gone)) if layout == "per-layer" else mask
    claim = written(dense, out, mask)
    check_contents(claim)
    assert_equal_to_masked(dense, out, mask, custom=claim.custom_code)
    assert compare_layerwise(claim, PROBES).relative < 1e-12
    plan = make_plan(claim.checkpoint, mask)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert sum(tensor.numel() for tensor in stored.values()) == plan.sliced.parameters
    assert sum(tensor.nbytes for tensor in stored.values()) == plan.sliced.weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_cut_loads_by_the_stock_class_and_its_kernels(dense, dtype, tmp_path):
    mask = mask_for(Checkpoint(dense), 0.6, "uniform", 3, 0.7)
    claim = written(dense, tmp_path / "cut", mask)
    assert not claim.custom_code and not (tmp_path / "cut" / "modeling_sspcompile.py").exists()
    loaded = load(dense, fingerprint="", dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=dtype)
    assert type(stock).__name__ == claim.geometry.family.architecture
    with torch.inference_mode(), masked(loaded, mask.units):
        expected, found = (model(torch.tensor([IDS])).logits.float() for model in (loaded.model, stock))
    assert (expected - found).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * expected.abs().max()
    config, width = stock.config, mask.widths[0]
    assert getattr(config, claim.geometry.family.width) == width < claim.geometry.width
    assert all(experts(layer).down_proj.shape[-1] == width for layer in stock.model.layers)


def test_whole_models_and_layers_prove_a_cut_and_find_a_wrong_weight_of_an_expert(dense, mask, tmp_path):
    claim = written(dense, tmp_path / "cut", mask)
    assert all(prove(claim, PROBES, silent, layerwise=way).holds for way in (False, True))
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    name = down_names(claim.geometry, 1)[0]
    tensors[name] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ParityError, match="output of layer 1 differs"):
        compare_layerwise(claim, PROBES)
    with pytest.raises(ParityError, match=name):
        check_contents(claim)


def test_every_flipped_bit_of_an_expert_is_found_and_its_tensor_named(dense, mask, tmp_path):
    claim = written(dense, tmp_path / "cut", mask)
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in sorted(tensors) if ".experts." in name][::3]:
        words = tensors[name].view(torch.uint8).view(-1)
        words[-1] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ParityError, match=name):
            check_contents(claim)
        words[-1] ^= 1


def test_a_cut_whose_layers_lie_on_disk_computes_the_same(dense, mask, tmp_path):
    written(dense, tmp_path / "cut", mask)
    whole = load_cut(tmp_path / "cut", trust_remote_code=True)
    stored = open_streaming(tmp_path / "cut", resolve(ON_CPU), 0, "sdpa", trust_remote_code=True)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        assert torch.allclose(stored(ids).logits, whole.model(ids).logits, atol=1e-4)
    dense_stored = replace(
        load(dense, fingerprint=""), model=open_streaming(dense, resolve(ON_CPU), 0, "sdpa", trust_remote_code=False)
    )
    with torch.inference_mode(), masked(dense_stored, mask.units):
        assert torch.allclose(dense_stored.model(ids).logits, whole.model(ids).logits, atol=1e-4)


def test_experts_that_another_library_moves_are_masked_and_read_too(dense, mask, tmp_path):
    """accelerate reads them from disk around the forward pass of their module."""
    room = {"max_memory": {"cpu": 100_000}, "offload_folder": tmp_path / "offload"}
    spread = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, device_map="auto", **room).eval()
    whole = load(dense, fingerprint="")
    assert experts(spread.model.layers[2]).down_proj.is_meta and hasattr(
        experts(spread.model.layers[2]), "_old_forward"
    )
    moved = replace(whole, model=spread.requires_grad_(False))
    answers = []
    for model in (whole, moved):
        with torch.inference_mode(), masked(model, mask.units):
            answers.append(model.model(torch.tensor([IDS])).logits)
    assert torch.allclose(*answers, atol=1e-4)
    batches = with_continuations(whole, PROMPTS[:3], 2)
    found = [curvature(model, CriterionInput(batches, 3)).channels for model in (whole, moved)]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-6 * found[0].max())


def test_what_a_token_computes_with_falls_by_the_experts_that_it_visits(dense, mask):
    checkpoint = Checkpoint(dense)
    g, plan = checkpoint.geometry, make_plan(checkpoint, mask)
    for layer, (whole, left) in enumerate(plan.by_layer):
        gone = g.width - plan.widths[layer]
        of_heads = 2 * 2 * g.hidden * g.head_dim * (g.heads - plan.counts[layer][0])
        of_heads += 2 * 2 * g.hidden * g.head_dim * (g.kv_heads - plan.counts[layer][1])
        assert whole.flops_per_token - left.flops_per_token == of_heads + 2 * 3 * g.hidden * g.active_experts * gone


def test_plan_and_card_count_the_channels_of_all_experts(dense, mask):
    plan = plan_json(make_plan(Checkpoint(dense), mask))
    g = Checkpoint(dense).geometry
    assert plan["widths"] == [*mask.widths] and plan["dense_width"] == g.width and plan["experts"] == g.experts
    whole = 3 * g.experts * g.width
    card = slice_card(plan, mask, {"source_name": "dense"}, "cut")
    assert f"{whole - sum(map(len, mask.channels))} of its {whole} MLP channels" in card


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_of_experts_is_of_the_newest_schema_and_is_read_back(mask):
    text = dump_mask(mask)
    assert json.loads(text)["schema_version"] == 5 and parse_mask(text) == mask
    heads = replace(mask, channels=None, experts=1)
    assert json.loads(dump_mask(heads))["schema_version"] == 2 and "experts" not in json.loads(dump_mask(heads))


def test_masks_whose_experts_are_not_equally_wide_or_not_of_this_model_are_refused(dense, mask):
    ragged = (mask.channels[0][:-1], *mask.channels[1:])
    with pytest.raises(ArtifactError, match="layer 0 keeps different numbers of channels in its experts"):
        parse_mask(dump_mask(replace(mask, channels=ragged)))
    empty = tuple(c for c in mask.channels[0] if c >= mask.intermediate)
    with pytest.raises(ArtifactError, match="different numbers of channels in its experts"):
        parse_mask(dump_mask(replace(mask, channels=(empty, *mask.channels[1:]))))
    beyond = (*mask.channels[0][:-1], mask.experts * mask.intermediate)
    with pytest.raises(ArtifactError, match="out of range"):
        parse_mask(dump_mask(replace(mask, channels=(beyond, *mask.channels[1:]))))
    others = replace(mask, channels=tuple((0, 1) for _ in mask.channels), experts=2, intermediate=1)
    with pytest.raises(ArtifactError, match=r"2 experts of 1 channels in every layer; the model has . experts"):
        make_plan(Checkpoint(dense), others)


def test_widths_that_kernels_of_experts_do_not_take_are_refused(dense, mask):
    g = Checkpoint(dense).geometry
    odd = tuple(e * g.width + c for e in range(g.experts) for c in range(EXPERT_STEP + 1))
    with pytest.raises(ArtifactError, match=r"experts of 9 channels.*multiple of 8"):
        make_plan(Checkpoint(dense), replace(mask, channels=(odd, *mask.channels[1:])))
    assert channel_step(g) == EXPERT_STEP and channel_step(replace(g, expert_intermediate=14336)) == 64


# --- Scores and repair -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(dense) -> LoadedModel:
    return load(dense, fingerprint="")


def test_experts_one_by_one_compute_what_the_class_does_and_the_others_are_not_run(loaded):
    module, visited = experts(loaded.layers[0]), []

    def same(number, tokens, channels):
        visited.append((number, tokens.tolist()))
        return channels

    x = torch.randn(5, loaded.geometry.hidden)
    chosen, shares = torch.tensor([[0, 2], [2, 0], [0, 1], [0, 2], [2, 1]]), torch.rand(5, 2)
    with torch.inference_mode():
        expected = module(x, chosen, shares)
        with one_by_one(module, same):
            found = module(x, chosen, shares)
        assert module(x, chosen, shares).equal(expected)
    assert torch.allclose(found, expected, atol=1e-5)
    assert visited == [(0, [0, 1, 2, 3]), (1, [2, 4]), (2, [0, 1, 3, 4])]


def test_channels_of_the_pass_are_the_fisher_information_of_gates_on_every_expert(loaded):
    """Each text by itself, so that gates of its own can be had from autograd; together the same up to the draws."""
    texts = batches_of(loaded, continued(loaded, PROMPTS[:3], new_tokens=3), 1)
    assert [batch.rows for batch in texts] == [(0,), (1,), (2,)]
    found = curvature(loaded, CriterionInput(texts, 3, seed=3)).channels
    wanted = information_of_gates(loaded, texts, 3)
    assert found is not None and (found > 0).mean() > 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_texts_of_a_batch_count_each_by_itself(loaded):
    """The information is of each text's own gradient; summed over the batch first, signs would cancel."""
    texts = continued(loaded, PROMPTS[:4], new_tokens=3)
    (batch,) = batches_of(loaded, texts, 1 << 12)
    found = curvature(loaded, CriterionInput([batch], 4, seed=3)).channels
    g, positions, wanted = loaded.geometry, batch.score_mask.sum(-1), 0.0
    gates = [torch.ones(g.layers, g.channels, requires_grad=True) for _ in range(len(batch.rows))]
    length = batch.input_ids.shape[1]

    def of_each(layer):
        def gated(number, tokens, channels):
            rows = torch.stack([gate[layer].view(g.mlps, g.width)[number] for gate in gates])
            return channels * rows[tokens // length]

        return gated

    with torch.enable_grad():
        contexts = [one_by_one(experts(layer), of_each(index)) for index, layer in enumerate(loaded.layers)]
        for context in contexts:
            context.__enter__()
        states = decoder_output(loaded, batch)[batch.score_mask]
        generator = fisher.batch_generator(loaded, 3, batch)
        towards = state_gradients(loaded, states, lambda logits: fisher.logit_cotangent(logits, "normal", generator))
        gradients = torch.autograd.grad(states, gates, towards)
        for context in contexts:
            context.__exit__(None, None, None)
    for gradient, count in zip(gradients, positions.tolist(), strict=True):
        wanted = wanted + gradient.double().square().numpy() / count / 4
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_channels_of_least_information_cost_least(loaded):
    """Of every expert a third goes, by information, at random, or by information the wrong way round."""
    batches, g = with_continuations(loaded, PROMPTS, 2), loaded.geometry
    channels = curvature(loaded, CriterionInput(batches, len(PROMPTS))).channels
    whole = np.ones((g.layers, g.heads))
    counts = Counts(((g.kv_heads, g.group_size),) * g.layers, (g.width * 2 // 3,) * g.layers)

    def lost(worth: np.ndarray) -> float:
        kept = realised(Worth(whole, worth), g, counts, per_layer=False).units
        return residual_error(loaded, kept, batches, None)

    chance = np.mean([lost(np.random.default_rng(seed).random(channels.shape)) for seed in range(3)])
    assert 1.5 * lost(channels) < chance < lost(-channels)


def test_without_scores_experts_fall_alike():
    from sspcompile.families import geometry_of

    g = geometry_of(expert_config("qwen3_moe").to_dict())
    channels = even_worth(g, channels=True).channels
    assert channels is not None and channels.shape == (g.layers, g.channels)
    assert (channels.reshape(g.layers, g.mlps, g.width) == channels[0, : g.width]).all()


# --- As their users meet them ----------------------------------------------------------------------------------------

FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--quiet")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_build_by_size_narrows_experts(run: Run, at: Path, dense: Path, layout):
    sums = stated(at / "sums.yaml")
    asked = ("--size", 0.6, "--layout", layout, "--baselines", "all" if layout == "uniform" else "few")
    code, _, err = run("build", "--model", dense, "--scenario", sums, "--out", "cut", *asked, *FAST)
    assert code == 0, err
    plan, mask = json.loads((at / "cut" / "plan.json").read_text()), load_mask(at / "cut" / "mask.json")
    g = Checkpoint(dense).geometry
    assert plan["parameters"]["sliced"] <= 0.6 * plan["parameters"]["dense"]
    assert mask.experts == g.experts and min(mask.widths) < g.width and min(mask.widths) % EXPERT_STEP == 0
    assert plan["custom_code"] == (layout == "per-layer")
    report = read_report(at / "cut" / "report.json")
    assert report.mask.widths == mask.widths and report.mask.experts == g.experts
    text = (at / "cut" / "report.md").read_text()
    assert f"of {3 * g.channels} channels of the experts" in text and "Wanda-sp" not in text
    assert run("verify", "cut", "-q")[0] == 0
    code, out, _ = run("inspect", "cut")
    assert code == 0 and f"of {3 * g.channels} channels of the experts" in " ".join(out.split())
    model = AutoModelForCausalLM.from_pretrained(at / "cut" / "model", trust_remote_code=plan["custom_code"])
    ids = AutoTokenizer.from_pretrained(at / "cut" / "model")("How much is 3 times 4?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_bounds_hold_together_beside_a_loss(run: Run, at: Path, dense: Path):
    whole = make_plan(Checkpoint(dense), mask_for(Checkpoint(dense), 1.0, "uniform", 0))
    memory = round(0.75 * whole.memory(Serving(100, 2))[0])
    bounds = ("--max-params", round(0.8 * whole.dense.parameters), "--max-memory", memory, "--max-loss", 0.95)
    asked = (*bounds, "--context", 100, "--batch", 2, "--layout", "per-layer", "--baselines", "none")
    code, _, err = run("build", "--model", dense, "--scenario", stated(at / "sums.yaml"), "--out", "cut", *asked, *FAST)
    assert code == 0, err
    plan, mask = json.loads((at / "cut" / "plan.json").read_text()), load_mask(at / "cut" / "mask.json")
    assert plan["parameters"]["sliced"] <= bounds[1] and plan["memory"]["sliced"] <= memory
    assert mask.experts == whole.geometry.experts and min(mask.widths) < whole.geometry.width
    assert run("verify", "cut", "-q")[0] == 0


def test_slice_and_plan_take_a_mask_of_experts(run: Run, at: Path, dense: Path, mask: HeadMask):
    (at / "mask.json").write_text(dump_mask(replace(mask, model=fingerprint(Checkpoint(dense)))))
    code, out, err = run("plan", "--model", dense, "--mask", "mask.json", "--by-layer")
    assert code == 0, err
    assert "channels of the experts" in out
    assert run("slice", "--model", dense, "--mask", "mask.json", "--out", "cut")[0] == 0
    assert run("verify", "cut", "-q")[0] == 0 and run("verify", "cut", "-q", "--layerwise")[0] == 0
    code, out, _ = run("plan", "--model", dense, "--size", 0.7, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["parameters"]["sliced"] <= 0.7 * plan["parameters"]["dense"]
    assert min(plan["widths"]) < plan["dense_width"]


@pytest.mark.parametrize(
    ("format_", "reason"),
    [("onnx", "The ONNX export does not know"), ("gguf", "mixtures of experts were not tried in llama.cpp")],
)
def test_exports_that_hold_no_experts_say_so(run: Run, at: Path, dense: Path, mask: HeadMask, format_, reason):
    (at / "mask.json").write_text(dump_mask(replace(mask, model=fingerprint(Checkpoint(dense)))))
    assert run("slice", "--model", dense, "--mask", "mask.json", "--out", "cut")[0] == 0
    code, out, err = run("export", "cut", "--format", format_)
    assert code != 0 and out == "" and reason in err and "--format hf" in err and err.count("\n") == 1


def test_a_nested_artifact_of_experts_is_refused(run: Run, at: Path, dense: Path):
    asked = ("--scenario", stated(at / "sums.yaml"), "--nested", "0.9,0.7", "--out", "cut", *FAST)
    code, _, err = run("build", "--model", dense, *asked)
    assert code != 0 and "stores fused or stacked tensors" in err and not (at / "cut").exists()
