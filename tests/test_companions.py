"""Files beside the weights: what a loader may read goes with every output, byte for byte; the rest is told."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint, stated
from hub import REVISION, hub
from huggingface_hub.utils import filter_repo_objects
from stored import stored_as
from test_slicing_exact import mask_for
from transformers import AutoTokenizer

from sspcompile.checkpoint import Checkpoint, copy_companions
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.locate import HUB_IGNORED, HUB_PATTERNS
from sspcompile.checkpoint.source import not_carried
from sspcompile.slicing.mask import dump_mask

# What tokenizers, templates and licences are called in public repositories.
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.4.0.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "qwen.tiktoken", "tekken.json", "tekken_240911.json"),
    *("chat_template.jinja", "chat_template.json", "tool_chat_template.jinja", "SYSTEM_PROMPT.txt"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENCE.md", "License", "NOTICE", "Notice.txt", "COPYING", "USE_POLICY.md"),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("additional_chat_templates/deeper/more.jinja",),
)
LEFT = (
    *(
        "params.json",
        "modeling_x.py",
        "tokenizer.py",
        "tokenization_x.py",
        "consolidated.safetensors",
        "pytorch_model.bin",
    ),
    *("optimizer.pt", "model.gguf", "logo.png", "training_args.bin", "trainer_state.json"),
    *("adapter_notes.txt", "qwen_generation_utils.py"),
)
LEFT_FOLDERS = ("original", "onnx", "figures")
UNTOLD = (".gitattributes", "README.md")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model", Shape(layers=2, hidden=64, head_dim=16))


@pytest.fixture
def model(dense, tmp_path) -> Path:
    """A model folder with everything that public ones hold."""
    folder = stored_as(dense, tmp_path / "model", lambda tensors: tensors)
    inner = [f"{name}/{'tokenizer.model' if name == 'original' else 'config.json'}" for name in LEFT_FOLDERS]
    for number, name in enumerate((*CARRIED, *LEFT, *UNTOLD, *inner)):
        if not (folder / name).exists() and name not in ("merges.txt", "vocab.json", "added_tokens.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = "{}" + " " * number if name.endswith(".json") else f"{number}\r\nä"
            (folder / name).write_bytes(content.encode())
    return folder


def carried(folder: Path) -> list[str]:
    return sorted(name for name in CARRIED if (folder / name).is_file())


def sliced(run, folder: Path, out: Path) -> tuple[int, str, str]:
    mask = out.with_suffix(".json")
    mask.write_text(dump_mask(mask_for(Checkpoint(folder), 0.5, "uniform", 3)))
    return run("slice", "--model", folder, "--mask", mask, "--out", out, "--any-model")


def test_companions_are_copied_byte_for_byte_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    named = (*CARRIED, *LEFT, "tokenizer.safetensors", "vocab.bin")
    contents = {name: bytes([number]) * 3 + b"\r\n" for number, name in enumerate(named)}
    for name, content in {**contents, "config.json": b"{}", "original/tokenizer.json": b"{}"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "tokenizer").mkdir()
    assert copy_companions(source, target) == sorted(CARRIED)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == {name: contents[name] for name in CARRIED}


def test_cut_and_exports_hold_the_same_companions_and_say_what_is_left_out(model, run, tmp_path):
    told = sorted((*LEFT, *(name + "/" for name in LEFT_FOLDERS)))
    code, _, err = sliced(run, model, tmp_path / "cut")
    assert code == 0 and [line for line in err.splitlines() if line.startswith("Left out")], err
    code, _, err = run("export", "--format", "onnx", "--model", model, "--out", tmp_path / "onnx")
    assert code == 0 and "Left out" in err and told[0] in err, err
    for out in (tmp_path / "cut", tmp_path / "onnx"):
        assert carried(out) == carried(model)
        assert all((out / name).read_bytes() == (model / name).read_bytes() for name in carried(model))
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["origin"]["left_out"] == told
        assert "additional_chat_templates/deeper/more.jinja" in manifest["files"]
    templates = AutoTokenizer.from_pretrained(tmp_path / "cut").chat_template
    assert set(templates) == set(AutoTokenizer.from_pretrained(model).chat_template)


def test_folder_without_anything_else_is_not_talked_about(dense, run, tmp_path):
    code, _, err = sliced(run, dense, tmp_path / "cut")
    assert code == 0 and "Left out" not in err
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["origin"]["left_out"] == []


def test_build_and_its_hf_export_hold_the_same_companions(model, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tool_chat_template.jinja", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (model / name).write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name in ("rag.jinja", "deeper/more.jinja"):
        (model / "additional_chat_templates" / name).unlink()
    sums = stated(tmp_path / "sums.yaml", max_tokens=48, continuation_tokens=2, repair="none", baselines="none")
    code, _, err = run(
        "build", "--scenario", sums, "--model", model, "--keep", 0.75, "--layout", "uniform", "--out", "a"
    )
    assert code == 0, err
    assert "Left out" in err
    assert run("export", "a", "--out", "hf")[0] == 0
    for out in (tmp_path / "a" / "model", tmp_path / "hf"):
        assert carried(out) == carried(model)
        assert all((out / name).read_bytes() == (model / name).read_bytes() for name in carried(model))


# --- Links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(model, tmp_path) -> Path:
    """The same folder as a hub cache keeps it: every file a link into the store of its repository."""
    root = tmp_path / "models--org--tiny"
    folder = root / "snapshots" / REVISION
    (root / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = folder / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs" / str(number)).write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(root / "blobs" / str(number), link.parent))
    return folder


def test_links_of_a_hub_cache_are_copied_as_their_content(snapshot, model, run, tmp_path):
    code, _, err = sliced(run, snapshot, tmp_path / "cut")
    assert code == 0, err
    assert carried(tmp_path / "cut") == carried(model)
    assert not [path for path in (tmp_path / "cut").rglob("*") if path.is_symlink()]
    assert all((tmp_path / "cut" / name).read_bytes() == (model / name).read_bytes() for name in carried(model))


@pytest.mark.parametrize("name", ["NOTICE", "chat_template.jinja", "additional_chat_templates/secret.jinja"])
@pytest.mark.parametrize("kind", ["folder", "snapshot"])
def test_link_that_leaves_the_folder_is_left_out_and_told(kind, name, request, run, tmp_path):
    folder = request.getfixturevalue("model" if kind == "folder" else "snapshot")
    (tmp_path / "secret").write_text("not for others")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    assert name not in companions(folder)
    assert sliced(run, folder, tmp_path / "cut")[0] == 0
    assert not [path for path in (tmp_path / "cut").rglob("*") if path.is_file() and b"not for" in path.read_bytes()]
    assert name in json.loads((tmp_path / "cut" / "manifest.json").read_text())["origin"]["left_out"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "vocab.txt"])
def test_tokenizer_that_is_a_link_to_elsewhere_is_refused(name, model, run, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "elsewhere")
    code, _, err = sliced(run, model, tmp_path / "cut")
    assert code == 2 and f"{name} is a link that leaves the model folder" in err and "Put the file itself" in err
    assert not (tmp_path / "cut").exists()


def test_link_inside_of_the_folder_is_followed(model):
    (model / "NOTICE").unlink()
    (model / "NOTICE").symlink_to("LICENSE")
    assert "NOTICE" in companions(model)


def test_folder_that_is_a_link_is_not_entered(model, tmp_path):
    (model / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert not [name for name in companions(model) if "/" in name]
    assert "additional_chat_templates/" in not_carried(model)


def test_broken_link_is_no_companion(model):
    (model / "NOTICE").unlink()
    (model / "NOTICE").symlink_to("nowhere")
    assert "NOTICE" not in companions(model) and "NOTICE" in not_carried(model)


# --- A tokenizer of mistral-common's alone ---------------------------------------------------------------------------


def tekken() -> str:
    """A tokenizer of single bytes in Mistral's format, with as many tokens as the model has."""
    named = [{"rank": n, "token_str": s, "is_control": True} for n, s in enumerate(["<unk>", "<s>", "</s>", "<pad>"])]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)]
    config = {
        "pattern": r"\s+|\S+",
        "num_vocab_tokens": 256,
        "default_vocab_size": 260,
        "default_num_special_tokens": 4,
    }
    return json.dumps({"config": {**config, "version": "v7"}, "vocab": vocab, "special_tokens": named})


@pytest.fixture
def mistral(dense, tmp_path) -> Path:
    folder = stored_as(dense, tmp_path / "mistral", lambda tensors: tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tekken.json").write_text(tekken())
    return folder


def test_slice_carries_a_tekken_tokenizer(mistral, run, tmp_path):
    assert sliced(run, mistral, tmp_path / "cut")[0] == 0
    assert (tmp_path / "cut" / "tekken.json").read_bytes() == (mistral / "tekken.json").read_bytes()


def test_build_names_tekken_and_a_command_that_helps(mistral, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = ("prepare", "--model", mistral)
    code, _, err = run(*prepare)
    assert code == 2 and err.count("\n") == 1 and "tekken.json" in err and 'python -c "' in err, err
    command = err.partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    again = AutoTokenizer.from_pretrained(mistral)
    assert again("ab").input_ids == [4 + ord("a"), 4 + ord("b")] and again.eos_token == "</s>"


# --- The hub ---------------------------------------------------------------------------------------------------------

SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
REPOSITORY = (*("config.json", "model.safetensors.index.json", *SHARDS, "README.md", "adapter_config.json"), *CARRIED)
NOT_FETCHED = (
    *("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/consolidated.00.pth"),
    *("original/model-00001-of-00002.safetensors", "original/tokenizer.model", "original/params.json"),
    *(
        "onnx/model.onnx",
        "onnx/config.json",
        "onnx/tokenizer.json",
        "gguf/model.gguf",
        "model-Q4.gguf",
        "metal/model.bin",
    ),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors", "tf_model.h5", "params.json"),
    *(
        "configuration_x.py",
        "tokenizer.py",
        "assets/tokenizer.json",
        "assets/x.jinja",
        "figures/logo.png",
        ".gitattributes",
    ),
)


def test_hub_patterns_fetch_what_is_read_and_the_licence_once():
    asked = {"allow_patterns": HUB_PATTERNS, "ignore_patterns": HUB_IGNORED}
    found = set(filter_repo_objects([*REPOSITORY, *NOT_FETCHED], **asked))
    assert found == set(REPOSITORY), (found ^ set(REPOSITORY),)


def fetched(folder: Path, tmp_path: Path, *command: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    with hub("org/tiny", folder) as (address, files):
        surroundings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "sspcompile.cli.main", *command],
            env={**os.environ, **surroundings, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    return done, sorted(files)


@pytest.mark.parametrize("shards", ["model-{:05d}-of-00003.safetensors", "layers_{}.safetensors"])
def test_repository_is_fetched_without_its_second_format(shards, model, tmp_path):
    """Shards have the usual names or others; the index is what says so."""
    folder = stored_as(model, tmp_path / "repository", lambda tensors: tensors, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for number in (1, 2, 3):
        usual, name = f"model-{number:05d}-of-00003.safetensors", shards.format(number)
        (folder / usual).rename(folder / name)
        index["weight_map"] = {key: name if file == usual else file for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done, files = fetched(folder, tmp_path, "plan", "--model", "org/tiny", "--keep", "0.5", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["total_heads"] == 8, done.stderr
    weights = [shards.format(number) for number in (1, 2, 3)]
    assert files == sorted([*carried(model), *weights, "config.json", "model.safetensors.index.json", "README.md"])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')


def said(**settings: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return change


REFUSED = {
    "an adapter": (adapter, "org/tiny is a LoRA adapter of owner/base"),
    "pickles": (without_weights, "pickled .bin weights"),
    "quantised": (said(quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ-quantised (4 bits)"),
    "another kind of model": (said(model_type="gpt2"), "'gpt2' cannot be cut"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_are_not_fetched_of_what_cannot_be_cut(case, dense, tmp_path):
    change, says = REFUSED[case]
    folder = stored_as(dense, tmp_path / "repository", lambda tensors: tensors)
    change(folder)
    done, files = fetched(folder, tmp_path, "plan", "--model", "org/tiny", "--keep", "0.5")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not [name for name in files if name.endswith((".safetensors", ".bin"))]
