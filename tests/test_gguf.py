"""A GGUF file in place of a model: read right, made a folder of once, cut like others, or refused with the way out."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import stated
from ggufs import TEXTS, source, write_gguf
from refusals import refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sspcompile.checkpoint import check_manifest
from sspcompile.checkpoint.gguf import read_gguf
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.model.context import context_of
from sspcompile.model.dense import open_dense
from sspcompile.model.llama_session import MODEL

QUICK = ("--criterion", "magnitude", "--repair", "none", "--max-tokens", 16, "--continuation-tokens", 0, "--keep", 0.5)
BUILD = ("build", "--scenario", "sums.yaml", *QUICK, "-q")
BLOCK, LEVELS = 32, 127
DTYPES = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float16}
HEAD_DIMS = {"llama": 32, "qwen2": 16, "qwen3": 128}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> the folder that its GGUF files are made from."""
    made: dict[str, Path] = {}

    def get(family: str, *, tied: bool = False) -> Path:
        name = f"{family}-{tied}"
        if name not in made:
            made[name] = source(tmp_path_factory.mktemp(name), family, tied=tied, head_dim=HEAD_DIMS[family])
        return made[name]

    return get


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SSPCOMPILE_HOME", str(tmp_path / "home"))
    return tmp_path


def logits(folder: Path) -> torch.Tensor:
    return answered(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def answered(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def assert_rounded_to_eight_bits(folder: Path, dense: Path) -> None:
    """In a block of 32 a number moves by half a step of its largest / 127, and by the rounding of both to fp16."""
    found, wanted = (load_file(place / "model.safetensors") for place in (folder, dense))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dim() == 1:
            assert torch.equal(found[name].float(), tensor), name
            continue
        blocks = tensor.reshape(-1, BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        moved = (found[name].float().reshape(-1, BLOCK) - blocks).abs()
        assert (moved <= largest * (0.5 / LEVELS + 2**-10)).all() and moved.max() > 0, name


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_of_a_file_is_the_one_that_it_was_written_from(family, kind, models, home):
    dense = models(family)
    file = write_gguf(dense, home / "m.gguf", kind)
    opened = open_dense(str(file))
    folder = opened.checkpoint.path
    assert folder == home / "home" / "artifacts" / "gguf" / read_gguf(file, "m").fingerprint
    if kind == "q8_0":
        assert_rounded_to_eight_bits(folder, dense)
    else:
        assert apart(logits(folder), logits(dense)) == 0
    # Against transformers' own reading of the file: the same numbers, those of products rounded to fp16.
    read = AutoModelForCausalLM.from_pretrained(home, gguf_file="m.gguf", dtype=torch.float32)
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in read.state_dict().items():
        assert torch.equal(written[name], tensor.to(DTYPES[kind]).float()), name
    read.load_state_dict(written)
    assert torch.equal(logits(folder), answered(read))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == DTYPES[kind]
    assert opened.origin["gguf"]["types"].keys() == {"F32", kind.upper()}
    assert (opened.origin["gguf"]["difference"] == 0) == (kind != "q8_0")
    check_manifest(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tied_embeddings_stay_tied(family, models, home):
    dense = models(family, tied=True)
    folder = open_dense(str(write_gguf(dense, home / "m.gguf", "f16"))).checkpoint.path
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert apart(logits(folder), logits(dense)) == 0


def test_the_tokenizer_of_a_file_writes_the_tokens_of_the_source(models, home):
    dense = models("qwen2")
    folder = open_dense(str(write_gguf(dense, home / "m.gguf"))).checkpoint.path
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, dense))
    for text in (*TEXTS, "<s>What</s>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 2)


def test_a_folder_is_made_once_for_each_file_and_is_whole_or_absent(models, home, monkeypatch):
    file = write_gguf(models("qwen2"), home / "m.gguf", "q8_0")
    first = open_dense(str(file))
    place = first.checkpoint.path
    stamp = (place / "model.safetensors").stat().st_mtime_ns
    shutil.copyfile(file, home / "another-name.gguf")
    second = open_dense(str(home / "another-name.gguf"))
    assert second.fingerprint == first.fingerprint and second.checkpoint.path == place
    assert (place / "model.safetensors").stat().st_mtime_ns == stamp
    other = open_dense(str(write_gguf(models("qwen2"), home / "f16.gguf", "f16")))
    assert other.checkpoint.path != place
    shutil.rmtree(place)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sspcompile.model.dequantising.write_manifest", full)
        with pytest.raises(OSError, match="No space"):
            open_dense(str(file))
    assert not place.exists() and list(place.parent.iterdir()) == [other.checkpoint.path]
    assert open_dense(str(file)).fingerprint == first.fingerprint, "equal files give equal folders"


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "default"])
def test_a_tokenizer_that_is_read_otherwise_is_taken_from_beside_the_file(pre, models, home, run):
    dense = models("llama")
    file = write_gguf(dense, home / "m.gguf", pre=pre)
    done = run("build", "--scenario", "Questions about metals", "--model", file, "--dry-run")
    refused(done, f"has a tokenizer (gpt2, {pre})", "tokenizer.json and tokenizer_config.json beside the file")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(dense / name, home / name)
    opened = open_dense(str(file))
    folder = opened.checkpoint.path
    assert folder.name.startswith(read_gguf(file, "m").fingerprint + "-")
    assert (folder / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert opened.origin["gguf"]["tokenizer"] == "beside the file"


def test_a_file_is_planned_built_cut_and_found_again(models, home, run, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("SSPCOMPILE_HOME", ".")
    write_gguf(models("qwen2"), home / "m.gguf", "q8_0")
    code, out, err = run("plan", "--model", "m.gguf", "--keep", 0.5, "--json")
    assert code == 0, err
    assert not (home / "artifacts").exists(), "sizes follow from the header"
    planned = json.loads(out)
    stated(home / "sums.yaml")
    code, _, err = run(*BUILD, "--model", "m.gguf", "--out", "artifacts/small")
    assert code == 0, err
    assert "8 bits" not in err and "Reading m.gguf" in err and "the rounded model" in err
    manifest = json.loads((home / "artifacts" / "small" / "manifest.json").read_text())
    assert manifest["origin"]["source_name"] == str(home / "m.gguf")
    assert manifest["origin"]["gguf"]["types"]["Q8_0"] > 0 and manifest["origin"]["gguf"]["file"] == "m.gguf"
    assert "license: apache-2.0" in (home / "artifacts" / "small" / "model" / "README.md").read_text()
    report = json.loads((home / "artifacts" / "small" / "report.json").read_text())
    assert any("a GGUF file, rounded to Q8_0" in note for note in report["notes"])
    plan = json.loads((home / "artifacts" / "small" / "plan.json").read_text())
    assert plan["parameters"]["dense"] == planned["parameters"]["dense"]
    assert plan["weight_bytes"]["dense"] == planned["weight_bytes"]["dense"]
    code, _, err = run("verify", "artifacts/small", "-q")
    assert code == 0 and "Reading" not in err and "the rounded model" in err, err
    mask = home / "artifacts" / "small" / "mask.json"
    assert run("slice", "--model", "m.gguf", "--mask", mask, "--out", "cut", "-q")[0] == 0
    cut, built = (load_file(home / place / "model.safetensors") for place in ("cut", "artifacts/small/model"))
    assert cut.keys() == built.keys() and all(cut[name].equal(built[name]) for name in cut)


def test_an_f16_file_says_nothing_of_rounding(models, home, caplog):
    caplog.set_level("INFO", "sspcompile")
    open_dense(str(write_gguf(models("qwen2"), home / "m.gguf", "f16")))
    assert "Reading" in caplog.text and "rounded" not in caplog.text


def broken(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("part", "message"), [(0.9, "damaged or cut off"), (0.3, "damaged or cut off"), (0.001, "damaged or cut off")]
)
def test_a_file_that_is_cut_off_is_refused(part, message, models, home, run):
    whole = write_gguf(models("llama"), home / "whole.gguf").read_bytes()
    file = broken(home / "m.gguf", whole[: int(len(whole) * part)])
    refused(run("plan", "--model", file, "--keep", 0.5), message, "Download it again")
    refused(run("plan", "--model", broken(home / "four.gguf", whole[:4]), "--keep", 0.5), message)
    assert not (home / "home").exists()


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else", b"\0" * 100])
def test_a_file_that_is_no_gguf_is_refused(content, home, run):
    file = broken(home / "m.gguf", content)
    refused(run("plan", "--model", file, "--keep", 0.5), "is no GGUF file")


def test_a_part_of_several_is_refused(models, home, run):
    file = write_gguf(models("llama"), home / "m-00001-of-00002.gguf")
    refused(run("plan", "--model", file, "--keep", 0.5), "one part of several", "llama-gguf-split --merge")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"architecture": "mamba"}, ("architecture 'mamba'", "Read are llama, qwen2, qwen3", "safetensors checkpoint")),
        ({"architecture": "granite"}, ("architecture 'granite'", "Read are")),
        ({"settings": {"rope.scaling.type": "yarn"}}, ("rope.scaling.type to 'yarn'",)),
        ({"settings": {"expert_count": 8}}, ("expert_count to 8",)),
        ({"settings": {"attention.sliding_window": 64}}, ("attention.sliding_window to 64",)),
        ({"settings": {"logit_scale": 0.5}}, ("logit_scale to 0.5",)),
        ({"settings": {"attention.key_length": 8}}, ("attention.key_length 8", "head_dim 32")),
        ({"extra": {"rope_freqs.weight": np.ones(16, np.float32)}}, ("rope_freqs.weight", "positions")),
    ],
)
def test_what_transformers_would_overlook_is_refused_by_its_name(change, fragments, models, home, run):
    file = write_gguf(models("llama"), home / "m.gguf", **change)
    refused(run("plan", "--model", file, "--keep", 0.5), *fragments)
    refused(run("slice", "--model", file, "--mask", "none.json", "--out", home / "cut"), *fragments)
    assert not (home / "home").exists() or not list((home / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"extra": {"blk.0.attn_q.bias": np.ones(128, np.float32)}}, ("numbers, and", "LlamaForCausalLM")),
        ({"without": ("model.layers.1.mlp.up_proj.weight",)}, ("numbers, and", "LlamaForCausalLM")),
    ],
)
def test_a_tensor_too_many_or_too_few_is_refused(change, fragments, models, home, run):
    file = write_gguf(models("llama"), home / "m.gguf", **change)
    refused(run("slice", "--model", file, "--mask", "none.json", "--out", home / "cut"), *fragments)
    assert not list((home / "home").rglob("*.safetensors"))


def test_a_head_size_that_says_nothing_new_is_taken(models, home):
    file = write_gguf(models("qwen2"), home / "m.gguf", settings={"attention.key_length": 16})
    assert apart(logits(open_dense(str(file)).checkpoint.path), logits(models("qwen2"))) == 0


def test_spoiled_headers_are_read_or_refused_in_one_line(models, home):
    good, rng = write_gguf(models("qwen2"), home / "m.gguf", "q8_0").read_bytes(), random.Random(1)
    refusals = 0
    for _ in range(300):
        spoiled = bytearray(good)
        for _ in range(rng.choice((1, 2, 4))):
            spoiled[rng.randrange(4, 12_000)] = rng.choice((0, 1, 128, 255))
        try:
            read_gguf(broken(home / "x.gguf", bytes(spoiled)), "x").check(own_tokenizer=True)
        except (CheckpointError, UnsupportedModelError) as error:
            refusals += "\n" not in str(error)
    assert refusals > 100


def test_a_place_that_cannot_be_written_to_is_named(models, home, monkeypatch, run):
    (home / "taken").write_text("a file")
    monkeypatch.setenv("SSPCOMPILE_HOME", str(home / "taken"))
    file = write_gguf(models("qwen2"), home / "m.gguf")
    done = run("slice", "--model", file, "--mask", "none.json", "--out", home / "cut")
    refused(done, "cannot be written to", "Set SSPCOMPILE_HOME")


def test_a_folder_of_gguf_files_says_how_one_is_given(models, home, run):
    (home / "folder").mkdir()
    write_gguf(models("qwen2"), home / "folder" / "m.gguf")
    refused(run("plan", "--model", home / "folder", "--keep", 0.5), "holds GGUF weights", "by its path to --model")


def test_the_longest_text_of_a_file_that_is_only_timed_is_its_configurations(tmp_path):
    """A published export says it in its manifest; what bench writes for the occasion has none."""
    (tmp_path / MODEL).write_bytes(b"")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 96}')
    assert context_of(tmp_path) == 96
    (tmp_path / "manifest.json").write_text('{"origin": {"context_length": 64}}')
    assert context_of(tmp_path) == 64
