"""What is written refers to nothing that is not there, and loads with and without consent to run code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from builders import FAMILY_SETTINGS, family_config, save_random
from test_export_onnx import export
from test_families import uniform_half
from test_slicing_exact import IDS, assert_equal_to_masked, mask_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import UnsupportedModelError
from sspcompile.model.dense import open_dense
from sspcompile.model.loading import load_cut
from sspcompile.slicing.configuration import ships_code
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": "Somebody/another--tokenization_x.XTokenizer",
}
PIPELINES = {"pair": {"impl": "pair_classification.Pair", "pt": ["AutoModelForCausalLM"]}}
LAYOUTS = ("uniform", "per-layer", "whole")


def with_code(folder: Path, **more: object) -> Path:
    """A checkpoint as the hub has many: stock weights, and names of the code that they once needed."""
    for name, values in {
        "config.json": {"auto_map": AUTO_MAP, "custom_pipelines": PIPELINES, **more},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
            "processor_class": "XProcessor",
        },
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{name}.py").write_text("raise RuntimeError('foreign code was run')\n")
    return folder


def cut(source: Path, out: Path, layout: str) -> tuple[Path, object, bool]:
    checkpoint = Checkpoint(source)
    masks = {
        "uniform": lambda: uniform_half(checkpoint),
        "per-layer": lambda: mask_for(checkpoint, 0.6, "per-layer", 3),
        "whole": lambda: mask_for(checkpoint, 1.0, "uniform", 3),
    }
    mask = masks[layout]()
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, out)
    return out, mask, plan.custom_code


def named_files(value: object) -> set[str]:
    """Whatever looks like MODULE.Class or OTHER/REPOSITORY--MODULE.Class in the values of a JSON file."""
    if isinstance(value, dict):
        return set().union(*map(named_files, value.values()))
    if isinstance(value, list):
        return set().union(*map(named_files, value))
    found = re.fullmatch(r"(?:.+--)?([a-z]\w*)\.[A-Z]\w*", value) if isinstance(value, str) else None
    return {f"{found[1]}.py"} if found else set()


def assert_complete(folder: Path) -> None:
    for file in folder.glob("*.json"):
        missing = {name for name in named_files(json.loads(file.read_text("utf-8"))) if not (folder / name).is_file()}
        assert not missing, (file.name, missing)
    assert not {"processor_class", "auto_map"} & set(json.loads((folder / "tokenizer_config.json").read_text("utf-8")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_cut_names_no_code_that_stays_behind(family, layout, tmp_path):
    source = with_code(save_random(tmp_path / "dense", family_config(family), seed=1))
    out, mask, custom = cut(source, tmp_path / "cut", layout)
    assert_complete(out)
    assert ships_code(out) == custom == (layout == "per-layer")
    # With consent, nothing but our own class is there to run; without, a stock class needs none.
    assert_equal_to_masked(source, out, mask, custom=True)
    if not custom:
        assert_equal_to_masked(source, out, mask, custom=False)
    tokenizers = [AutoTokenizer.from_pretrained(out, trust_remote_code=trust) for trust in (True, False)]
    assert tokenizers[0]("gold").input_ids == tokenizers[1]("gold").input_ids


def test_an_uncut_folder_without_names_of_code_keeps_every_byte(tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama"), seed=1)
    out, *_ = cut(source, tmp_path / "cut", "whole")
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("processor", "kept"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, True),
        ({"auto_map": {"AutoProcessor": "processing_x.XProcessor"}, "processor_class": "XProcessor"}, False),
        (None, False),
    ],
)
def test_a_processor_is_named_where_it_can_be_loaded(processor, kept, tmp_path):
    source = with_code(save_random(tmp_path / "dense", family_config("gemma3_text"), seed=1))
    if processor is not None:
        (source / "preprocessor_config.json").write_text(json.dumps(processor))
    out, *_ = cut(source, tmp_path / "cut", "uniform")
    said = [json.loads(file.read_text()) for file in out.glob("*_config.json")]
    assert any("processor_class" in one for one in said) == kept
    assert not any("auto_map" in one for one in said)


@pytest.mark.parametrize("layout", ["dense", *LAYOUTS])
def test_export_names_no_code_that_stays_behind(layout, tmp_path):
    model = with_code(save_random(tmp_path / "dense", family_config("phi3"), seed=1))
    if layout != "dense":
        model, *_ = cut(model, tmp_path / "cut", layout)
    # Foreign code is never consented to.
    export(model, tmp_path / "onnx", trust_remote_code=ships_code(model))
    assert_complete(tmp_path / "onnx")


def test_foreign_code_is_not_run_and_not_needed(tmp_path):
    source = with_code(save_random(tmp_path / "dense", family_config("llama"), seed=1))
    assert not ships_code(source)
    expected = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)(torch.tensor([IDS])).logits
    for loaded in (load_cut(source), open_dense(str(source)).load()):
        assert loaded.model(torch.tensor([IDS])).logits.equal(expected)


def test_weights_by_another_name_are_refused_and_the_usual_name_is_not(tmp_path):
    """transformers reads the file that config.json names; what is cut would be another model."""
    source = with_code(
        save_random(tmp_path / "dense", family_config("llama"), seed=1), transformers_weights="model.safetensors"
    )
    out, mask, _ = cut(source, tmp_path / "cut", "uniform")
    assert_equal_to_masked(source, out, mask, custom=False)
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    with_code(source, transformers_weights="other.safetensors")
    with pytest.raises(UnsupportedModelError, match="names its weights"):
        _ = Checkpoint(source).tensors
    with pytest.raises(UnsupportedModelError, match="names its weights"):
        export(source, tmp_path / "onnx")


@pytest.mark.parametrize("content", ["", "[1]", "{not json", "\ud800"])
def test_settings_that_cannot_be_read_are_copied_as_they_are(content, tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama"), seed=1)
    (source / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    out, *_ = cut(source, tmp_path / "cut", "uniform")
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
