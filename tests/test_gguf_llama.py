"""GGUF exports in llama.cpp: what it computes is what transformers computes (`make test-gguf`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp")

from commands import inside
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_models import PRE_TOKENIZERS, config_for, cut, dense, tokenizer
from safetensors.torch import load_file, save_file
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import TensorInfo, read_header
from sspcompile.checkpoint.manifest import read_manifest
from sspcompile.errors import InputError, ParityError
from sspcompile.export.gguf.check import TEXTS, compare, demand_tokens, read_reference
from sspcompile.export.gguf.publish import GATE, GgufExport, export_gguf
from sspcompile.model.blocks import BLOCK, GGUF_ROUNDINGS
from sspcompile.model.llama_session import MODEL, LlamaModel
from sspcompile.model.llama_text import load_gguf
from sspcompile.model.loading import load_cut
from sspcompile.model.placement import Placement
from sspcompile.progress import silent
from sspcompile.proof.probes import random_probes
from sspcompile.slicing.mask import dump_mask

pytestmark = pytest.mark.slow
# Threads of llama.cpp spin, which beside others at work takes a hundred times as long.
ONE_THREAD = Placement(device="cpu", dtype="float32", threads=1)
PROBES = random_probes(400)
ONE_WIDTH = 1.0
SLOWER = {"rope_type": "default", "rope_theta": 2e4}
# Family, layout, settings of the model, share of the channels -> architecture.
HELD = {
    "llama uniform": ("llama", "uniform", {}, 0.6, "llama"),
    "llama uniform biased": ("llama", "uniform", {"bias": True}, 0.6, "llama"),
    "llama per-layer": ("llama", "per-layer", {}, 0.6, "deci"),
    "llama per-layer biased": ("llama", "per-layer", {"bias": True}, 0.6, "deci"),
    "llama per-layer tied": ("llama", "per-layer", {"tied": True}, 0.6, "deci"),
    "mistral uniform": ("mistral", "uniform", {}, 0.6, "llama"),
    "mistral per-layer": ("mistral", "per-layer", {}, 0.6, "deci"),
    "qwen2 uniform": ("qwen2", "uniform", {}, 0.6, "llama"),
    "qwen2 per-layer": ("qwen2", "per-layer", {"tied": True}, 0.6, "deci"),
    "seed_oss uniform": ("seed_oss", "uniform", {"bias": True}, 0.6, "llama"),
    "seed_oss per-layer": ("seed_oss", "per-layer", {"bias": True}, 0.6, "deci"),
    "qwen3 uniform": ("qwen3", "uniform", {}, 0.6, "qwen3"),
    "qwen3 per-layer tied": ("qwen3", "per-layer", {"tied": True}, 0.6, "openelm"),
    "qwen3 per-layer": ("qwen3", "per-layer", {}, ONE_WIDTH, "step35"),
    "granite uniform": ("granite", "uniform", {}, 0.6, "granite"),
    "granite per-layer": (
        "granite",
        "per-layer",
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        0.6,
        "deci",
    ),
    "smollm3 uniform": ("smollm3", "uniform", {"no_rope_layers": [1, 1, 1, 0]}, 0.6, "smollm3"),
    "gemma3 uniform": ("gemma3_text", "uniform", {"tied": True}, 0.6, "gemma3"),
    "gemma3 per-layer": ("gemma3_text", "per-layer", {"tied": True}, 0.6, "gemma3"),
}
# Family, layout, settings, whether what stays is whole (`--units layers`), the layers that are removed -> architecture.
# Of Gemma 3 stay a layer of each kind, those without windows, those with; of SmolLM3 all layers that turn.
SHALLOWER = {
    "llama": ("llama", "uniform", {}, True, (0, 2), "llama"),
    "llama per-layer": ("llama", "per-layer", {}, False, (1,), "deci"),
    "qwen2": ("qwen2", "uniform", {"tied": True}, True, (2,), "llama"),
    "qwen3": ("qwen3", "uniform", {}, True, (0,), "qwen3"),
    "qwen3 per-layer tied": ("qwen3", "per-layer", {"tied": True}, False, (3,), "openelm"),
    "granite": ("granite", "uniform", {}, True, (1, 2), "granite"),
    "smollm3": ("smollm3", "uniform", {"no_rope_layers": [1, 1, 1, 0]}, True, (3,), "smollm3"),
    "gemma3 of both kinds": ("gemma3_text", "uniform", {"tied": True}, True, (0, 3), "gemma3"),
    "gemma3 without windows": ("gemma3_text", "uniform", {"tied": True}, True, (0, 2), "gemma3"),
    "gemma3 of windows": ("gemma3_text", "uniform", {"tied": True}, True, (1, 3), "gemma3"),
}


def exported(
    model: Path, out: Path, kind: str | None = None, *, custom: bool = False, **more: Mapping[str, TensorInfo]
) -> GgufExport:
    asked = {"kind": kind, "probes": PROBES, "origin": {}, "trust_remote_code": custom, "placement": ONE_THREAD}
    return export_gguf(model, out, card=lambda done: "", **asked, **more)[1]


@pytest.mark.parametrize("case", HELD)
def test_llama_cpp_computes_a_cut_as_transformers_does(case, tmp_path):
    family, layout, settings, width, architecture = HELD[case]
    source = dense(tmp_path / "dense", config_for(family, **settings))
    plan = cut(source, tmp_path / "cut", layout, width=width)
    if layout == "per-layer":
        assert len(set(plan.counts)) > 1 and (width == ONE_WIDTH or len(set(plan.widths)) > 1), "the case in question"
    verdict = next(one for one in plan.runtimes if one.runtime == "llama.cpp")
    assert verdict.loads and f"architecture {architecture}" in verdict.reason
    done = exported(tmp_path / "cut", tmp_path / "out", custom=plan.custom_code)
    assert done.architecture == architecture and done.structure.same_text
    assert done.structure.relative < (1e-2 if architecture == "gemma3" else 2e-5)


@pytest.mark.parametrize("case", SHALLOWER)
def test_llama_cpp_computes_a_cut_without_whole_layers_as_transformers_does(case, tmp_path):
    family, layout, settings, whole, removed, architecture = SHALLOWER[case]
    source = dense(tmp_path / "dense", config_for(family, **settings))
    rest = {"width": ONE_WIDTH, "keep": 1.0} if whole else {}
    plan = cut(source, tmp_path / "cut", layout, removed=removed, **rest)
    assert plan.removed == removed and plan.custom_code == (layout == "per-layer")
    verdict = next(one for one in plan.runtimes if one.runtime == "llama.cpp")
    assert verdict.loads and f"architecture {architecture}" in verdict.reason
    done = exported(tmp_path / "cut", tmp_path / "out", custom=plan.custom_code)
    assert done.architecture == architecture and done.structure.same_text
    assert done.structure.relative < (1e-2 if architecture == "gemma3" else 2e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_scaled_positions_are_the_same(kind, layout, tmp_path):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    source = dense(tmp_path / "dense", config_for("llama", rope_parameters=rope))
    plan = cut(source, tmp_path / "cut", layout)
    done = exported(tmp_path / "cut", tmp_path / "out", custom=plan.custom_code)
    assert done.structure.same_text and done.structure.relative < 2e-5


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_reads_the_same_tokens(name, bos, tmp_path):
    reads = tokenizer(name, bos=bos)
    source = dense(tmp_path / "dense", config_for("llama"), reads)
    exported(source, tmp_path / "out")
    model = LlamaModel(tmp_path / "out" / MODEL, threads=1)
    for text in (*TEXTS, "a<tool>b </s> c<s>", "12 345 6", "it'S WE'RE", "\t\t\n x  y   z    "):
        assert model.tokens(text) == reads(text)["input_ids"], text


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0", "q4_0", "q4_k_m"])
def test_every_type_loads_and_says_what_it_costs(kind, tmp_path):
    source = dense(tmp_path / "dense", config_for("llama"), dtype=torch.bfloat16)
    plan = cut(source, tmp_path / "cut", "per-layer")
    done = exported(tmp_path / "cut", tmp_path / "out", kind, custom=plan.custom_code)
    assert done.structure.same_text and done.structure.relative < 2e-5, "the model in fp32"
    assert done.agreement.mean_kl < (0.01 if kind in ("bf16", "f16", "q8_0") else 1.0)
    assert read_manifest(tmp_path / "out").origin["proven"] is True


@pytest.mark.parametrize("kind", GGUF_ROUNDINGS)
def test_llama_cpp_rounds_what_was_refitted_to_the_bits_that_the_repair_knew(kind, tmp_path):
    """Rows of down_proj that are not whole blocks included; what is compared sharply is the model as it is."""
    source = dense(tmp_path / "dense", config_for("llama", intermediate_size=112))
    plan = cut(source, tmp_path / "cut", "per-layer")
    own = load_file(tmp_path / "cut" / "model.safetensors")
    other = {name: 1.1 * w for name, w in own.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    save_file(other, tmp_path / "refitted.safetensors")
    refitted = read_header(tmp_path / "refitted.safetensors")
    done = exported(tmp_path / "cut", tmp_path / "out", kind, custom=plan.custom_code, refitted=refitted)
    assert done.refitted and done.structure.same_text and done.structure.relative < 2e-5
    stored = {one.name: one for one in GGUFReader(tmp_path / "out" / MODEL).tensors}
    for name, weight in other.items():
        layer = name.split(".")[2]
        one = stored[f"blk.{layer}.{'attn_output' if 'o_proj' in name else 'ffn_down'}.weight"]
        assert (one.tensor_type.name == "F16") == (weight.shape[1] % BLOCK != 0)
        assert np.array_equal(dequantize(one.data, one.tensor_type), GGUF_ROUNDINGS[kind].of(weight).numpy())


def test_an_export_of_another_model_is_found_out(tmp_path):
    for name, config in (("one", config_for("llama")), ("other", config_for("llama", rope_parameters=SLOWER))):
        exported(dense(tmp_path / name, config), tmp_path / f"{name}-gguf")
    reference = read_reference(
        tmp_path / "one", PROBES, 256, placement=ONE_THREAD, trust_remote_code=False, progress=silent
    )
    compare(tmp_path / "one-gguf" / MODEL, reference, GATE, silent)
    with pytest.raises(ParityError, match="Nothing was published"):
        compare(tmp_path / "other-gguf" / MODEL, reference, GATE, silent)


def test_other_tokens_are_found_out(tmp_path):
    exported(dense(tmp_path / "words", config_for("llama"), tokenizer("smaug-bpe")), tmp_path / "out")
    digits = dense(tmp_path / "digits", config_for("llama"), tokenizer("smollm"))
    reference = read_reference(digits, PROBES, 256, placement=ONE_THREAD, trust_remote_code=False, progress=silent)
    with pytest.raises(ParityError, match="reads other tokens than transformers"):
        demand_tokens(tmp_path / "out" / MODEL, reference)


def test_an_export_answers_as_its_model_does(tmp_path):
    source = dense(tmp_path / "dense", config_for("qwen3", tied=True))
    plan = cut(source, tmp_path / "cut", "per-layer")
    exported(tmp_path / "cut", tmp_path / "out", custom=plan.custom_code)
    ours = load_gguf(tmp_path / "out", placement=ONE_THREAD, scoring=True)
    theirs = load_cut(tmp_path / "cut", placement=ONE_THREAD, trust_remote_code=plan.custom_code)
    ids = torch.tensor([[2, 2, 40, 50, 60], [70, 80, 90, 100, 110]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert ours.continuations(ids, mask, 12) == theirs.continuations(ids, mask, 12)
    scored = mask.bool() & torch.tensor([False, False, False, True, True])
    found, wanted = (model.scored_logits(ids, mask, scored) for model in (ours, theirs))
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 0.01 * wanted.abs().max()
    assert ours.positions == theirs.positions and ours.ends == theirs.ends
    long = ours.continuations(torch.tensor([[5] * 200]), torch.ones(1, 200, dtype=torch.long), 56)
    assert len(long[0]) <= 56
    with pytest.raises(InputError, match="exceed the 256"):
        ours.continuations(torch.tensor([[5] * 200]), torch.ones(1, 200, dtype=torch.long), 57)


SHORT = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "3", "--processes", "3", "--threads", "1", "-q")


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> Path:
    """A per-layer cut and its exports in two types."""
    home = tmp_path_factory.mktemp("timed")
    source = dense(home / "dense", config_for("llama"))
    mask = mask_for(Checkpoint(source), 0.75, "per-layer", 1, 0.6)
    kept = tuple(row if layer else row[: mask.heads // mask.kv_heads] for layer, row in enumerate(mask.kept))
    (home / "mask.json").write_text(dump_mask(replace(mask, kept=kept)))
    for words in (
        ("slice", "--model", "dense", "--mask", "mask.json", "--any-model", "--out", "cut"),
        ("export", "cut", "--format", "gguf", "--type", "f32", "--out", "exact"),
        ("export", "cut", "--format", "gguf", "--type", "q8_0", "--out", "rounded"),
    ):
        done = inside(home, *words, "-q")
        assert done.code == 0, done.err
    return home


def test_an_export_is_timed_beside_the_dense_model_in_its_type(timed):
    done = inside(timed, "bench", "rounded", "--json", *SHORT)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    whole, cut = found["contenders"]
    assert (whole["name"], cut["name"]) == ("dense, gguf", "sliced, gguf")
    assert whole["dtype"] == cut["dtype"] and "Q8_0" in cut["dtype"] and cut["architecture"] == "llama.cpp deci"
    plan = json.loads((timed / "cut" / "plan.json").read_text())
    for side, one in (("dense", whole), ("sliced", cut)):
        # The cache is in fp16, the checkpoint in fp32.
        assert 2 * one["metrics"]["kv_bytes_per_token"]["median"] == plan["kv_bytes_per_token"][side]
        assert len(one["loads"][0]["metrics"]["inter_token_seconds"]["samples"]) == 3
    assert cut["metrics"]["weight_bytes"]["median"] < whole["metrics"]["weight_bytes"]["median"]
    assert {ratio["metric"] for ratio in found["ratios"]} >= {"prefill_seconds", "inter_token_seconds", "weight_bytes"}
    assert "llama-cpp-python" in found["versions"]


def test_types_are_timed_against_each_other_and_runtimes_in_one_run(timed):
    done = inside(timed, "bench", "rounded", "--against", "exact", "--json", *SHORT)
    assert done.code == 0, done.err
    assert [one["name"] for one in json.loads(done.out)["contenders"]] == ["exact, gguf", "sliced, gguf"]
    done = inside(timed, "bench", "cut", "--runtimes", "hf,gguf", "--json", *SHORT)
    assert done.code == 0, done.err
    named = [one["name"] for one in json.loads(done.out)["contenders"]]
    assert named == ["dense, hf", "dense, gguf", "sliced, hf", "sliced, gguf"]
    refused = inside(timed, "bench", "rounded", "exact", *SHORT)
    assert refused.code == 2 and "are GGUF exports of different types" in refused.err and "--against" in refused.err
