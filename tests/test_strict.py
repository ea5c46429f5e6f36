"""A configuration that transformers refuses is bad input wherever it is read; what another class holds is loaded."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import byte_tokenizer, family_config, save_random
from test_export_onnx import PROBES, assert_same, export
from test_settings_twice import change
from test_slicing_exact import IDS, assert_equal_to_masked, mask_for
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sspcompile.bench.process import Worker
from sspcompile.checkpoint import Checkpoint
from sspcompile.cli.main import main
from sspcompile.errors import ArtifactError, CheckpointError, InputError
from sspcompile.families import FAMILIES, stand_in
from sspcompile.model.loading import load, load_cut
from sspcompile.model.onnx_text import load_onnx
from sspcompile.model.opening import readable
from sspcompile.proof.claim import Claim
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.whole import compare_whole
from sspcompile.slicing.mask import dump_mask, whole_mask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

STRICT = {
    "whole number for a fraction": ("qwen3", {"rms_norm_eps": 1}),
    "null for a number": ("qwen3", {"attention_dropout": None}),
    "text for a token": ("llama", {"pad_token_id": "258"}),
    "list for a token": ("mistral", {"bos_token_id": [256]}),
    "fraction for a count": ("granite", {"max_position_embeddings": 256.0}),
    "number for a name": ("llama", {"hidden_act": 7}),
    "text for a switch": ("seed_oss", {"use_cache": "yes"}),
    "heads that do not divide the hidden size": ("gemma2", {"hidden_size": 64, "num_attention_heads": 6}),
}
# For what starts a process of its own.
TWO = ("whole number for a fraction", "heads that do not divide the hidden size")


@pytest.fixture(params=STRICT)
def strict(request, tmp_path):
    """A sound model folder, and the same with a configuration that transformers refuses."""
    if not is_dataclass(LlamaConfig):
        pytest.skip("this transformers does not check the types of a configuration yet")
    family, values = STRICT[request.param]
    options = {"kv_heads": 2, "group_size": 3} if "num_attention_heads" in values else {}
    config = family_config(family, **options, hidden=66 if options else 64)
    source = save_random(tmp_path / "dense", config, seed=1)
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in source.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    return source, change(spoilt, **values)


def assert_refused(action: object, *, named: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*config\.json") as caught:
        action()
    assert "\n" not in str(caught.value) and str(named) in str(caught.value) and caught.value.exit_code == 2


def test_loading_refuses_it_in_one_line(strict):
    _, spoilt = strict
    for action in (lambda: load(spoilt, fingerprint=""), lambda: load_cut(spoilt)):
        assert_refused(action, named=spoilt)


@pytest.mark.parametrize("strict", ["whole number for a fraction", "list for a token"], indirect=True)
def test_both_proofs_refuse_a_dense_model_with_it(strict):
    source, spoilt = strict
    checkpoint = Checkpoint(spoilt)
    g = checkpoint.geometry
    claim = Claim(checkpoint, whole_mask(g.layers, g.heads, g.kv_heads), source, custom_code=False)
    for compare in (compare_whole, compare_layerwise):
        assert_refused(lambda compare=compare: compare(claim, [IDS[:4]]), named=spoilt)


@pytest.mark.parametrize("strict", TWO, indirect=True)
def test_a_benchmark_refuses_it(strict):
    _, spoilt = strict
    asked = {"path": str(spoilt), "trust_remote_code": False, "threads": 1, "seed": 0, "device": "cpu"}

    def measure() -> None:
        with Worker("dense", "hf", threads=1) as worker:
            worker.wait_ready()
            with worker.session():
                worker.ask("load", **asked)

    assert_refused(measure, named=spoilt)


def test_an_export_refuses_it_and_an_exported_folder_with_it(strict, tmp_path):
    source, spoilt = strict
    if json.loads((source / "config.json").read_text())["model_type"] == "gemma2":
        return  # there is no graph for the family
    with pytest.raises(InputError) as caught:
        export(spoilt, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    export(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes((spoilt / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match="Export it again"):
        load_onnx(tmp_path / "out")


@pytest.mark.parametrize("strict", TWO, indirect=True)
def test_the_command_line_ends_with_2(strict, capsys):
    _, spoilt = strict
    with pytest.raises(SystemExit) as stop:
        main(["run", str(spoilt), "-p", "hi", "--max-new-tokens", "2", "-q"])
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "defect" not in err[-1] and err[-1].startswith("Error: transformers cannot load")


@pytest.mark.parametrize(
    "error",
    [ValueError("first\nsecond"), KeyError("key"), TypeError(), OSError("gone"), RuntimeError("bad.\nmore")],
    ids=lambda error: type(error).__name__,
)
def test_every_way_into_transformers_leaves_as_one_kind_of_error(error):
    with pytest.raises(CheckpointError, match=r"^transformers cannot load here: ") as caught, readable("here"):
        raise error
    assert "\n" not in str(caught.value)


# A dense model that its own class refuses, and the class that holds its cut does not.


def undivided(folder: Path, **values: object) -> Path:
    """A Llama of 6 heads at hidden size 80, written by the class that has the same tensors."""
    config = family_config("mistral", hidden=80, kv_heads=2, group_size=3)
    source = save_random(folder, config, seed=1)
    return change(source, model_type="llama", architectures=["LlamaForCausalLM"], sliding_window=..., **values)


def test_it_is_loaded_by_the_class_that_holds_it(tmp_path):
    source = undivided(tmp_path / "dense")
    with pytest.raises(Exception, match="not a multiple"):
        AutoModelForCausalLM.from_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    assert stand_in(config)["model_type"] == "mistral"
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in source.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    change(twin, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    expected = AutoModelForCausalLM.from_pretrained(twin)(torch.tensor([IDS])).logits
    for loaded in (load(source, fingerprint=""), load_cut(source)):
        assert loaded.model(torch.tensor([IDS])).logits.equal(expected)
        assert loaded.tokenizer("gold").input_ids == byte_tokenizer()("gold").input_ids


@pytest.mark.parametrize(
    ("keep", "layout"), [(0.7, "uniform"), (0.85, "uniform"), (0.7, "per-layer"), (1.0, "uniform")]
)
def test_its_cuts_are_proven_by_both_proofs(keep, layout, tmp_path):
    source = undivided(tmp_path / "dense")
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, keep, layout, 3)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=plan.custom_code)
    claim = Claim(checkpoint, mask, tmp_path / "cut", custom_code=plan.custom_code)
    assert compare_whole(claim, [IDS]).holds
    assert compare_layerwise(claim, [IDS]).holds


def test_it_is_exported_and_measured(tmp_path):
    source = undivided(tmp_path / "dense")
    export(source, tmp_path / "out")
    found = load_onnx(tmp_path / "out")
    loaded = load(source, fingerprint="")
    ids, mask = torch.tensor([PROBES[2]]), torch.ones(1, len(PROBES[2]), dtype=torch.long)
    expected = loaded.scored_logits(ids, mask, mask.bool())
    assert torch.allclose(found.scored_logits(ids, mask, mask.bool()), expected, atol=1e-3)
    with Worker("dense", "hf", threads=1) as worker:
        worker.wait_ready()
        with worker.session():
            facts = worker.ask("load", path=str(source), trust_remote_code=False, threads=1, seed=0, device="cpu")
            assert facts["parameters"] == sum(p.numel() for p in loaded.model.parameters())
            assert np.isfinite(worker.ask("trial", batch=1, prompt_tokens=4, new_tokens=3)["prefill_seconds"])


def test_slice_verify_and_run_take_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = undivided(tmp_path / "dense")
    (tmp_path / "mask.json").write_text(dump_mask(mask_for(Checkpoint(source), 0.7, "uniform", 3)))
    for command in (
        ["slice", "--model", "dense", "--mask", "mask.json", "--any-model", "--out", "cut", "-q"],
        ["verify", "cut", "-q"],
        ["verify", "cut", "-q", "--layerwise"],
        ["run", "dense", "-p", "hi", "--max-new-tokens", "2", "-q"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_other_model_is_loaded_by_its_own_class(family, tmp_path):
    config = json.loads(family_config(family).to_json_string())
    assert stand_in(config) is None


def test_the_stand_in_needs_no_tensors_that_are_not_there():
    """Biases would have to be written as zeros, which loading does not do."""
    config = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 80,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    assert stand_in(config | {"attention_bias": True, "mlp_bias": True})["model_type"] == "seed_oss"
    assert stand_in(config | {"sliding_window": 8}) is None


def test_tokenizers_are_asked_for_by_their_own_type(tmp_path):
    source = undivided(tmp_path / "dense")
    own = save_random(tmp_path / "own", family_config("llama"), seed=1)
    assert type(load_cut(source).tokenizer) is type(AutoTokenizer.from_pretrained(own))
    assert_same(own, export_of(own, tmp_path / "onnx"), [IDS, IDS[:5]])


def export_of(model: Path, out: Path) -> Path:
    export(model, out)
    return out
