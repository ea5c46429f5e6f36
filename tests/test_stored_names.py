"""Checkpoints under other names, or with stacked experts, are the same models: same identity, same cut, same proof."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import family_config, save_random
from safetensors.torch import load_file, save_file
from stored import below, decoder_as, head_only, stacked, stored_as
from test_slicing_exact import IDS, mask_for
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.checkpoint.headers import read_header
from sspcompile.checkpoint.transfer import Extent
from sspcompile.errors import CheckpointError
from sspcompile.families import FAMILIES
from sspcompile.model.loading import load
from sspcompile.slicing.cut import cut_tensors
from sspcompile.slicing.mask import dump_mask, whole_mask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

# The first two transformers 5 finds by itself; the others it finds because it is told the prefix.
NAMED = {
    "the decoder alone": decoder_as(""),
    "one prefix too many": below("model."),
    "inside of a model that sees": below("language_model."),
    "the newer name of that": decoder_as("model.language_model."),
    "a name for the decoder": decoder_as("language_model."),
    "wrapped for many devices": below("module."),
    "compiled": below("_orig_mod."),
    "wrapped by peft": below("base_model.model."),
}
STACKED = {
    "qwen3_moe as in memory": ("qwen3_moe", stacked("qwen3_moe", "mlp")),
    "mixtral as in memory": ("mixtral", stacked("mixtral", "mlp")),
    "mixtral below its old module": ("mixtral", stacked("mixtral", "block_sparse_moe")),
    "qwen3_moe without a prefix": ("qwen3_moe", lambda t: decoder_as("")(stacked("qwen3_moe", "mlp")(t))),
    "mixtral inside of another": ("mixtral", lambda t: below("language_model.")(stacked("mixtral", "mlp")(t))),
    "mixtral with the newer module": (
        "mixtral",
        lambda t: {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in t.items()},
    ),
}
# (family, tied, change): every family without a prefix, every name with one family, every stack.
FORMS = {
    **{f"{family} without a prefix": (family, False, decoder_as("")) for family in sorted(FAMILIES)},
    **{f"{form}, tied": ("qwen3", True, change) for form, change in NAMED.items()},
    **{form: ("gemma3_text", False, change) for form, change in NAMED.items()},
    **{form: (family, False, change) for form, (family, change) in STACKED.items()},
    "tied, under the name of the head": ("llama", True, head_only),
    "tied, under the name of the head, without a prefix": ("llama", True, lambda t: decoder_as("")(head_only(t))),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(family, tied) -> a random model as transformers stores it; made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, tied: bool) -> Path:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp("dense") / family
            made[family, tied] = save_random(folder, family_config(family, bias=True, tied=tied), seed=1)
        return made[family, tied]

    return get


@pytest.fixture(params=FORMS)
def pair(request, dense, tmp_path) -> tuple[Path, Path]:
    """(as transformers stores it, otherwise)"""
    family, tied, change = FORMS[request.param]
    source = dense(family, tied)
    return source, stored_as(source, tmp_path / "otherwise", change)


def written(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, info in read_header(file).items():
            content = file.read_bytes()[info.offset : info.offset + info.nbytes]
            found[name] = (info.dtype, info.shape, content)
    return found


def test_identity_does_not_depend_on_stored_names(pair):
    one, other = map(Checkpoint, pair)
    assert fingerprint(one) == fingerprint(other) and one.expected() == other.expected()


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_cut_has_the_bytes_and_the_configuration_of_the_usual_one(layout, pair, tmp_path):
    for number, source in enumerate(map(Checkpoint, pair)):
        write_model(source, make_plan(source, mask_for(source, 0.5, layout, 3, 0.7)), tmp_path / f"cut-{number}")
    assert written(tmp_path / "cut-0") == written(tmp_path / "cut-1")
    assert (tmp_path / "cut-0" / "config.json").read_bytes() == (tmp_path / "cut-1" / "config.json").read_bytes()


def test_dense_model_is_loaded_with_its_weights(pair):
    with torch.inference_mode():
        one, other = (load(path, fingerprint="").model(torch.tensor([IDS])).logits for path in pair)
    assert one.equal(other)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(
    ("family", "change"), [("qwen2", decoder_as("")), ("mixtral", stacked("mixtral", "mlp")), ("llama", head_only)]
)
def test_model_that_keeps_every_head_is_written_under_the_usual_names(family, change, link, dense, tmp_path):
    """A whole file must not be copied, nor shared, when its names are not those that are written."""
    usual = dense(family, change is head_only)
    source = Checkpoint(stored_as(usual, tmp_path / "otherwise", change, shards=3))
    g = source.geometry
    write_model(
        source, make_plan(source, whole_mask(g.layers, g.heads, g.kv_heads)), tmp_path / "cut", link_unchanged=link
    )
    assert written(tmp_path / "cut") == written(usual)
    with torch.inference_mode():
        one, other = (
            AutoModelForCausalLM.from_pretrained(f)(torch.tensor([IDS])).logits for f in (usual, tmp_path / "cut")
        )
    assert one.equal(other)


def test_stacked_experts_are_moved_without_being_held(dense, tmp_path):
    source = Checkpoint(stored_as(dense("mixtral", False), tmp_path / "stacked", stacked("mixtral", "mlp")))
    tensors = cut_tensors(source, make_plan(source, mask_for(source, 0.5, "uniform", 3)))
    experts = [tensor for tensor in tensors if ".experts." in tensor.name]
    assert len(experts) == source.geometry.layers * source.geometry.experts * 3
    assert all(isinstance(piece, Extent) for tensor in experts for piece in tensor.content())


def test_class_of_the_decoder_alone_becomes_the_one_with_a_head(dense, tmp_path):
    folder = stored_as(dense("qwen3", True), tmp_path / "base", decoder_as(""))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    source = Checkpoint(folder)
    g = source.geometry
    for name, mask in (
        ("whole", whole_mask(g.layers, g.heads, g.kv_heads)),
        ("cut", mask_for(source, 0.5, "uniform", 3)),
    ):
        write_model(source, make_plan(source, mask), tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_model_as_the_class_without_a_head_saves_it(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense("qwen3", True))
    model.model.save_pretrained(tmp_path / "base")
    assert Checkpoint(tmp_path / "base").expected() == Checkpoint(dense("qwen3", True)).expected()


# --- What cannot be told apart ---------------------------------------------------------------------------------------


def test_two_names_for_one_tensor_are_refused(dense, tmp_path):
    def both(tensors):
        return {**tensors, "model.lm_head.weight": tensors["lm_head.weight"].clone()}

    with pytest.raises(CheckpointError, match=r"lm_head\.weight are both lm_head\.weight"):
        _ = Checkpoint(stored_as(dense("llama", False), tmp_path / "both", both)).tensors


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_stack_of_another_shape_is_refused(part, dense, tmp_path):
    folder = stored_as(dense("qwen3_moe", False), tmp_path / "stacked", stacked("qwen3_moe", "mlp"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(part))
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{part} has shape .*config.json asks for"):
        _ = Checkpoint(folder).tensors


# --- The commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("form", ["the decoder alone", "the newer name of that", "mixtral as in memory"])
def test_slice_is_proven_against_the_source_in_both_ways(form, layout, run, dense, tmp_path):
    family, tied, change = FORMS[form]
    folder = stored_as(dense(family, tied), tmp_path / "otherwise", change, shards=2)
    checkpoint = Checkpoint(folder)
    mask = replace(mask_for(checkpoint, 0.5, layout, 3), model=fingerprint(checkpoint))
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    code, _, err = run("slice", "--model", folder, "--mask", tmp_path / "mask.json", "--out", tmp_path / "cut")
    assert code == 0, err
    for way in ((), ("--layerwise",)):
        code, text, err = run("verify", tmp_path / "cut", "--json", *way)
        assert code == 0 and json.loads(text)["same_text"], err


@pytest.mark.parametrize("form", ["the decoder alone, tied", "the newer name of that, tied"])
def test_export_of_the_source_computes_what_it_does(form, run, dense, tmp_path):
    family, tied, change = FORMS[form]
    folder = stored_as(dense(family, tied), tmp_path / "otherwise", change)
    code, text, err = run("export", "--format", "onnx", "--model", folder, "--out", tmp_path / "onnx", "--json")
    assert code == 0 and json.loads(text)["agreement"]["same_text"], err
