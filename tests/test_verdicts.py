"""`plan` says what `export` will say, and shows the layout that `build` would write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import FAMILY_SETTINGS, family_config, save_random
from safetensors.torch import load_file, save_file
from test_export_onnx import export
from test_families import uniform_half
from test_settings_twice import change
from test_slicing_exact import assert_equal_to_masked, mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.cli.main import main
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import FAMILIES, ONNX_FAMILIES
from sspcompile.slicing.hosts import uniform_host
from sspcompile.slicing.mask import HeadMask, dump_mask
from sspcompile.slicing.plan import host_of, make_plan
from sspcompile.slicing.write import write_model

SCALED = {"rope_theta": 1e4, "factor": 2.0}
LLAMA3 = SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
KINDS = {
    "default": {"rope_theta": 1e4},
    "linear": SCALED,
    "llama3": LLAMA3,
    "yarn": SCALED | {"original_max_position_embeddings": 64},
    "dynamic": SCALED,
    "longrope": LONG | {"original_max_position_embeddings": 64},
}
PHI3_KINDS = ("default", "longrope")
OTHERS = {
    "another activation": {"hidden_act": "gelu"},
    "both directions": {"is_causal": False},
    "a window of the cache alone": {"sliding_window": 16},
    "positions that turn a part": {"partial_rotary_factor": 0.5},
    "positions in the older spelling": {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def verdict(source: Path, mask: HeadMask | None = None) -> str | None:
    """Why ONNX Runtime is said not to load a cut; None where it is said to."""
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask or mask_for(checkpoint, 0.6, "per-layer", 3))
    found = next(one for one in plan.runtimes if one.runtime == "ONNX Runtime")
    return None if found.loads else found.reason


def assert_foretold(source: Path, tmp_path: Path, *, dense: bool = True) -> str | None:
    """The plan of a cut says what the export of the cut, and of the model itself, then do."""
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, "per-layer", 3)
    write_model(checkpoint, make_plan(checkpoint, mask), tmp_path / "cut")
    told = verdict(source, mask)
    for model in (tmp_path / "cut", source) if dense else (tmp_path / "cut",):
        try:
            export(model, tmp_path / f"{model.name}-onnx")
        except UnsupportedModelError as error:
            assert error.message == f"{told}."
        else:
            assert told is None
    return told


@pytest.mark.parametrize(
    ("family", "kind"), [(f, k) for f in ONNX_FAMILIES for k in KINDS if f != "phi3" or k in PHI3_KINDS]
)
def test_plan_foretells_what_export_makes_of_positions(family, kind, tmp_path):
    # Phi-3 wants as many factors as follow from hidden_size / heads.
    source = save_random(tmp_path / "dense", family_config(family, hidden=128 if family == "phi3" else 64), seed=1)
    change(source, rope_parameters=KINDS[kind] | {"rope_type": kind})
    told = assert_foretold(source, tmp_path)
    assert (told is None) == (kind not in ("dynamic", "longrope"))


@pytest.mark.parametrize("case", OTHERS)
def test_plan_foretells_what_export_refuses(case, tmp_path):
    source = change(save_random(tmp_path / "dense", family_config("llama"), seed=1), **OTHERS[case])
    assert assert_foretold(source, tmp_path)


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_plan_foretells_for_which_families_there_is_a_graph(family, tmp_path):
    told = assert_foretold(save_random(tmp_path / "dense", family_config(family), seed=1), tmp_path)
    assert (told is None) == (family in ONNX_FAMILIES)


@pytest.mark.parametrize("head_dim", [4, 8, 16, 24, 32])
def test_plan_foretells_for_which_head_sizes_there_is_a_kernel(head_dim, tmp_path):
    assert_foretold(save_random(tmp_path / "dense", family_config("llama", head_dim=head_dim), seed=1), tmp_path)


@pytest.mark.parametrize("turned", [[0, 0, 0], [1, 0, 1]])
def test_plan_foretells_it_for_layers_without_positions(turned, tmp_path):
    config = family_config("smollm3", head_dim=8)
    config.no_rope_layers = turned
    assert_foretold(save_random(tmp_path / "dense", config, seed=1), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_plan_foretells_from_which_dtypes_a_graph_is_made(dtype, tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama"), seed=1)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert (assert_foretold(source, tmp_path) is None) == (dtype != torch.float64)


# The layout.


def shown(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments, "--json"])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    return json.loads(printed.out)


def longrope(tmp_path: Path) -> Path:
    config = family_config("phi3", hidden=128)
    config.rope_parameters = LONG | {"rope_type": "longrope", "partial_rotary_factor": 1.0}
    config.original_max_position_embeddings = 64
    return save_random(tmp_path / "dense", config, seed=1)


def undivided(tmp_path: Path, family: str) -> Path:
    """No count of heads but 8 of 8 divides the hidden size."""
    return save_random(tmp_path / "dense", family_config(family, hidden=64, kv_heads=8, group_size=1), seed=1)


def test_plan_shows_the_layout_that_some_class_can_hold(tmp_path, capsys):
    model = str(longrope(tmp_path))
    for layout in ([], ["--layout", "auto"], ["--layout", "per-layer"]):
        found = shown(capsys, "--model", model, "--keep", "0.5", *layout)
        assert found["layout"] == "per-layer" and found["custom_code"] and found["kept_heads"] <= 12
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", model, "--keep", "0.5", "--layout", "uniform"])
    assert stop.value.code == 2 and "--layout per-layer" in capsys.readouterr().err


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.hidden_must_divide and not row.hosts])
def test_plan_leaves_the_uniform_layout_out_as_build_does(family, tmp_path, capsys):
    found = shown(capsys, "--model", str(undivided(tmp_path, family)), "--keep", "0.4")
    assert found["layout"] == "per-layer" and found["custom_code"]


@pytest.mark.parametrize("family", ["phi3", *(f for f, row in FAMILIES.items() if row.hidden_must_divide)])
def test_layers_that_happen_to_be_of_one_shape_are_held_by_the_custom_class(family, tmp_path):
    """A per-layer mask may keep the same numbers everywhere; a stock class holds it where one can, ours elsewhere."""
    source = longrope(tmp_path) if family == "phi3" else undivided(tmp_path, family)
    checkpoint = Checkpoint(source)
    uniform = uniform_half(checkpoint) if family == "phi3" else mask_for(checkpoint, 0.4, "uniform", 1)
    mask = HeadMask(**{**vars(uniform), "layout": "per-layer"})
    plan = make_plan(checkpoint, mask)
    heads, kv_heads = plan.counts[0]
    shapes = [(kv_heads, heads // kv_heads)] * len(plan.counts)
    assert host_of(checkpoint.geometry, shapes, layout="per-layer").family is plan.host
    if family == "llama":
        assert not plan.custom_code and uniform_host(checkpoint.geometry, heads).family is plan.host
    else:
        assert plan.custom_code
        with pytest.raises(UnsupportedModelError, match="--layout per-layer"):
            make_plan(checkpoint, uniform)
    write_model(checkpoint, plan, tmp_path / "cut")
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=plan.custom_code)


def test_slice_takes_such_a_mask_from_its_file(tmp_path, capsys):
    source = longrope(tmp_path)
    mask = HeadMask(**{**vars(uniform_half(Checkpoint(source))), "layout": "per-layer"})
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    found = shown(capsys, "--model", str(source), "--mask", str(tmp_path / "mask.json"))
    assert found["custom_code"] and len({tuple(pair) for pair in found["counts"]}) == 1
