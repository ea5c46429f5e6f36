"""A LoRA adapter in place of a model: merged as peft merges it, told, found again, or refused with the way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import byte_tokenizer, family_config, save_random, stated
from hub import REVISION, ask, hub
from refusals import refused
from safetensors.torch import load_file, save_file
from stored import below, stored_as
from test_slicing_exact import mask_for
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.checkpoint.publish import remove_temporary
from sspcompile.errors import CheckpointError
from sspcompile.model.dense import open_dense
from sspcompile.model.stored import read_tensor
from sspcompile.slicing.mask import dump_mask

QUICK = ("--criterion", "magnitude", "--repair", "none", "--max-tokens", 16, "--continuation-tokens", 0, "--keep", 0.5)
BUILD = ("build", "--scenario", "chemistry-helpdesk", *QUICK, "-q")
Q, OUT, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
KILL = "import os\nos.kill(os.getpid(), 9)"
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "o_proj", "down_proj"],
    "bias": "none",
    "lora_dropout": 0.1,
    "inference_mode": True,
    # What peft writes beside it, on or off, that decides nothing.
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "peft_version": "0.21.2",
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made: dict[tuple, Path] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: object) -> Path:
        key = (family, dtype, *more.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / family
            made[key] = save_random(folder, family_config(family, layers=2, **more), dtype=dtype)
        return made[key]

    return get


def adapter(
    folder: Path, base: Path, layers: tuple[str, ...] = (Q, OUT, DOWN), *, rank: int = 4, **settings: object
) -> Path:
    """Random A and B for some layers of a base."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for layer in layers:
        rows, columns = Checkpoint(base).tensors[f"{layer}.weight"].shape
        own = int(settings.get("rank_pattern", {}).get(layer, rank))
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(own, columns, generator=generator)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, own, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = SETTINGS | {"base_model_name_or_path": str(base), "r": rank} | settings
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def mask_of(checkpoint: Checkpoint, path: Path) -> Path:
    path.write_text(dump_mask(replace(mask_for(checkpoint, 0.5, "uniform", 3), model=fingerprint(checkpoint))))
    return path


def origin_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["origin"]


@pytest.fixture(autouse=True)
def anew(tmp_path, monkeypatch):
    """Temporary folders are this test's own, and what one test merged is merged again by the next."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    remove_temporary()


def left_behind() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(".partial-sspcompile-merged-*"))


# --- Merging ---------------------------------------------------------------------------------------------------------


# peft asks transformers for a property under its older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {OUT: 2}, "alpha_pattern": {DOWN: 3}},
        {"target_modules": ["q_proj", "o_proj", "down_proj", "k_proj"], "layers_to_transform": [0, 1]},
    ],
    ids=["plain", "rslora", "patterns", "layers"],
)
def test_merged_weights_are_those_of_peft(settings, dtype, peft, bases, tmp_path):
    base = bases(dtype=dtype)
    folder = adapter(tmp_path / "adapter", base, **settings)
    found = open_dense(str(folder)).checkpoint
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    theirs = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    dense = Checkpoint(base)
    assert found.tensors.keys() == dense.tensors.keys()
    for name, info in found.tensors.items():
        assert torch.equal(read_tensor(info), theirs[name]), name
        changed = name.removesuffix(".weight") in (Q, OUT, DOWN)
        assert changed != torch.equal(read_tensor(info), read_tensor(dense.tensors[name])), name
    assert (base / "tokenizer.json").read_bytes() == (found.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "mixtral"])
def test_fused_and_expert_layers_are_merged_where_they_lie(family, peft, bases, tmp_path):
    """By hand: W + alpha / r * B A. transformers 5 has no linear layer of an expert's; its adapters of 4.x have."""
    base = bases(family, torch.float32)
    names = [name for name in Checkpoint(base).tensors if "layers.0" in name and "norm" not in name]
    layer = next(name for name in names if "qkv_proj" in name or "experts.1" in name).removesuffix(".weight")
    folder = adapter(tmp_path / "adapter", base, (layer,))
    a, b = (t for _, t in sorted(load_file(folder / "adapter_model.safetensors").items()))
    found = open_dense(str(folder)).checkpoint
    before = read_tensor(Checkpoint(base).tensors[f"{layer}.weight"])
    torch.testing.assert_close(read_tensor(found.tensors[f"{layer}.weight"]), before + 3.0 * b @ a)


def test_base_under_other_names_gives_the_same_model(peft, bases, tmp_path):
    base = bases()
    other = stored_as(base, tmp_path / "other", below("language_model."))
    one, two = (
        adapter(tmp_path / f"adapter-{n}", base, base_model_name_or_path=str(b)) for n, b in enumerate((base, other))
    )
    assert open_dense(str(one)).fingerprint == open_dense(str(two)).fingerprint


def test_tokenizer_saved_with_the_adapter_is_taken_as_a_whole(peft, bases, tmp_path):
    base = shutil.copytree(bases(), tmp_path / "base")
    (base / "vocab.json").write_text("{}")
    (base / "LICENSE").write_text("Theirs.")
    folder = adapter(tmp_path / "adapter", base)
    byte_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("An adapter.")
    found = open_dense(str(folder)).checkpoint.path
    assert (found / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()
    assert (found / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert not (found / "vocab.json").exists() and (found / "LICENSE").read_text() == "Theirs."
    assert not (found / "README.md").exists()


def test_nobody_else_notices_a_merge(peft, bases, tmp_path, recwarn):
    """Neither random numbers nor warnings, with shards written side by side."""
    base = stored_as(bases(), tmp_path / "base", lambda tensors: tensors, shards=4)
    names = [name.removesuffix(".weight") for name in Checkpoint(base).tensors if "_proj" in name]
    folder = adapter(tmp_path / "adapter", base, tuple(names), rank_pattern={names[0]: 2})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    open_dense(str(folder))
    assert torch.equal(torch.rand(3), expected) and [str(warning.message) for warning in recwarn] == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("tokenizer", [False, True])
def test_what_peft_saves_is_taken(tokenizer, peft, bases, tmp_path):
    base = bases(dtype=torch.float32)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    if tokenizer:
        byte_tokenizer().save_pretrained(tmp_path / "adapter")
    found, theirs = open_dense(str(tmp_path / "adapter")).checkpoint, model.merge_and_unload().state_dict()
    assert [name for name, info in found.tensors.items() if not torch.equal(read_tensor(info), theirs[name])] == []


# --- Commands --------------------------------------------------------------------------------------------------------


def test_build_and_verify_merge_again_and_the_manifest_names_both(peft, bases, run, tmp_path):
    base = bases(dtype=torch.float32)
    folder = adapter(tmp_path / "adapter", base)
    sums = ("build", "--scenario", stated(tmp_path / "sums.yaml"), *QUICK, "-q")
    done = run(*sums, "--model", "adapter", "--out", "built")
    assert done[0] == 0, done
    line = next(line for line in done[2].splitlines() if line.startswith("Merging"))
    told = origin_of(tmp_path / "built")
    assert told["source_name"] == str(folder) and told["adapter"]["base_name"] == str(base)
    assert told["adapter"]["base"] == fingerprint(Checkpoint(base)) and told["source"] != told["adapter"]["base"]
    assert "adapter" in line and told["adapter"]["fingerprint"][:12] in line and told["adapter"]["base"][:12] in line
    assert left_behind() == []
    # Another process, in another place: the same bytes again.
    weights = (tmp_path / "built" / "model" / "model.safetensors").read_bytes()
    mask = tmp_path / "built" / "mask.json"
    asked = [sys.executable, "-m", "sspcompile.cli.main"]
    more = ("slice", "--model", folder, "--mask", mask, "--out", tmp_path / "cut", "--checksums")
    again = subprocess.run([*asked, *map(str, more)], capture_output=True, text=True, cwd="/", check=False)
    assert again.returncode == 0 and "Merging the LoRA adapter" in again.stderr, again.stderr
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == weights
    assert origin_of(tmp_path / "cut")["adapter"] == told["adapter"]
    for name in ("built", "cut"):
        done = run("verify", name, "--layerwise")
        assert done[0] == 0 and done[2].count("Merging the LoRA adapter") == 1, done
    done = run("eval", "built", "--items", 2, "--max-new-tokens", 2, "--json")
    assert done[0] == 0 and json.loads(done[1])["dense_model"] == str(folder), done
    assert left_behind() == []


def test_sizes_are_those_of_the_base_without_a_merge(bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    plans = [run("plan", "--model", model, "--keep", 0.5, "--json") for model in (folder, bases())]
    assert plans[0][0] == 0 and plans[0][1] == plans[1][1] and plans[0][2] == ""


def test_adapter_of_the_hub_is_found_again_at_its_commit(peft, bases, run, tmp_path, monkeypatch):
    """Nothing but the adapter is fetched of its repository."""
    folder = adapter(tmp_path / "adapter", bases())
    for name in ("optimizer.pt", "training_args.bin", "README.md"):
        (folder / name).write_bytes(b"x")
    mask = mask_of(open_dense(str(folder)).checkpoint, tmp_path / "mask.json")
    with hub("org/lora", folder) as (address, fetched):
        ask(monkeypatch, address, tmp_path / "hub")
        assert run("slice", "--model", "org/lora", "--mask", mask, "--out", "cut")[0] == 0
        assert sorted(fetched) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    told = origin_of(tmp_path / "cut")
    assert (told["source_name"], told["source_revision"]) == ("org/lora", REVISION)
    assert told["adapter"]["base_name"] == str(bases())
    assert "base_model: org/lora\n" in (tmp_path / "cut" / "README.md").read_text()
    ask(monkeypatch, None, tmp_path / "hub")
    assert run("verify", "cut", "--layerwise")[0] == 0


def test_verify_tells_an_adapter_that_was_trained_on(peft, bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    mask = mask_of(open_dense(str(folder)).checkpoint, tmp_path / "mask.json")
    assert run("slice", "--model", folder, "--mask", mask, "--out", "cut")[0] == 0
    shutil.rmtree(folder)
    adapter(folder, bases(), (Q, OUT))
    done = run("verify", "cut")
    assert done[0] == 2 and f"{folder} is not the model that cut was made from" in done[2], done


def test_killed_run_leaves_nothing_once_another_begins(peft, bases, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    code = f"from sspcompile.model.dense import open_dense\nopen_dense({str(folder)!r})\n" + KILL
    place = tmp_path / "temporary"
    surroundings = {**os.environ, "TMPDIR": str(place)}
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=False)
    assert len(list(place.iterdir())) == 1
    code = code.replace(KILL, f"import os\nprint(len(os.listdir({str(place)!r})))")
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and done.stderr == "" and list(place.iterdir()) == []


# --- Refused ---------------------------------------------------------------------------------------------------------


def without_peft(command: tuple[object, ...]) -> subprocess.CompletedProcess:
    """The command line where peft is not to be found."""
    code = (
        "import importlib.util, sys\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'peft' else found(name, *more)\n"
        "from sspcompile.cli.main import main\nmain(sys.argv[1:])"
    )
    return subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)


def test_without_peft_one_line_says_what_to_install(bases, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    done = without_peft((*BUILD, "--model", folder, "--out", tmp_path / "built"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'sspcompile[peft]'" in done.stderr and "merge_and_unload()" in done.stderr
    assert not (tmp_path / "built").exists()


BEYOND = {
    "DoRA": ({"use_dora": True}, "sets use_dora"),
    "whole layers": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save: embed_tokens, lm_head"),
    "biases": ({"bias": "all"}, "changes biases (bias: all)"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: pissa_niter_16"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets target_parameters"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication"),
    "a method of tomorrow": ({"use_qlora9": True}, "sets use_qlora9"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_not_plain_lora_is_refused_by_its_configuration(case, bases, run, tmp_path):
    settings, says = BEYOND[case]
    folder = adapter(tmp_path / "adapter", bases(), **settings)
    refused(run("plan", "--model", folder, "--keep", 0.5), "not a plain LoRA adapter", says, "merge_and_unload()")
    refused(run("prepare", "--model", folder), "not a plain LoRA adapter", says)


MALFORMED = {
    "modules_to_save": (7, "lm_head"),
    "bias": (7, ["none"]),
    "init_lora_weights": (["gaussian"], {}, 7),
    "r": ("4", 0, -1, 4.5, None, [4]),
    "lora_alpha": ("x", [1], float("nan"), float("inf")),
    "rank_pattern": ([1], {"(": 2}, {"q_proj": "x"}, 7),
    "alpha_pattern": ([1], {"(": 2}, {"q_proj": "x"}, 7),
    "base_model_name_or_path": (7, "", ["a/b"]),
    "revision": (7, ["main"], "../x"),
    "peft_type": (7, None, ["LORA"]),
}


@pytest.mark.parametrize("key", MALFORMED)
def test_malformed_configuration_ends_in_one_line_or_means_nothing(key, peft, bases, run, tmp_path):
    mask = mask_of(Checkpoint(bases()), tmp_path / "mask.json")
    for number, value in enumerate(MALFORMED[key]):
        folder = adapter(tmp_path / f"adapter-{number}", bases())
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        cut = ("slice", "--model", folder, "--mask", mask, "--any-model", "--out", f"cut-{number}")
        code, _, err = run(*cut)
        lines = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert (code, len(lines)) in ((2, 1), (0, 0)) and "Unexpected" not in err, (key, value, err)
        assert (tmp_path / f"cut-{number}").exists() == (code == 0)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "PROMPT_TUNING"])
def test_other_kinds_are_refused(kind, bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases(), peft_type=kind)
    refused(run("plan", "--model", folder, "--keep", 0.5), kind, str(bases()))


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


PARTS = {
    "an embedding": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 260)},
        "holds base",
    ),
    "a head of its own": (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(300, 64)}, "lm_head.weight"),
    "a magnitude": (lambda t: t | {f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(8)}, "magnitude"),
    "half a pair": (lambda t: {n: x for n, x in t.items() if not n.endswith("o_proj.lora_B.weight")}, f"for {OUT}"),
    "another rank": (lambda t: t | {f"base_model.model.{Q}.lora_A.weight": torch.ones(3, 64)}, f"for {Q}"),
    "nothing": (lambda t: {}, "no tensors"),
    "an unknown layer": (
        lambda t: {n.replace("q_proj", "x_proj"): x for n, x in t.items()},
        "is not a linear layer of",
    ),
    "an embedding as a matrix": (
        lambda t: {n.replace(Q, "model.embed_tokens"): x for n, x in t.items()},
        "is not a linear layer of",
    ),
    "another size": (
        lambda t: t | {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 65)},
        "as a matrix of [128, 65]",
    ),
    "a rank that its configuration denies": (
        lambda t: {n: (x[:3] if "lora_A" in n else x[:, :3]).contiguous() for n, x in t.items()},
        "has the rank 3, its configuration says 4",
    ),
    "no number": (lambda t: {n: x * torch.nan for n, x in t.items()}, "infinite or not a number in BF16"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_cannot_be_merged_are_named(case, peft, bases, run, tmp_path):
    change, says = PARTS[case]
    folder = adapter(tmp_path / "adapter", bases())
    changed(folder, change)
    done = run("prepare", "--model", folder)
    shown = done[2].splitlines()
    assert done[0] == 2 and says in shown[-1] and str(folder) in shown[-1] and len(shown) <= 2, done
    assert left_behind() == []


def test_tied_head_is_no_layer_of_its_own(peft, bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases(), ("lm_head",), base_model_name_or_path=str(bases(tied=True)))
    refused(run("prepare", "--model", folder), "changes lm_head", "is not a linear layer of")


def test_base_that_is_not_to_be_had_is_named(peft, bases, run, tmp_path):
    """`plan` asks for it, too: sizes are the base's."""
    folder = adapter(tmp_path / "adapter", bases(), base_model_name_or_path="owner/base", revision="v1")
    for command in (("plan", "--keep", 0.5), ("prepare",)):
        refused(run(*command, "--model", folder), f"{folder} is a LoRA adapter of owner/base@v1", "offline", "Download")
    shutil.rmtree(folder)
    adapter(folder, bases(), base_model_name_or_path=None)
    refused(run("prepare", "--model", folder), "does not say which model", "base_model_name_or_path")
    shutil.rmtree(folder)
    other = adapter(tmp_path / "other", bases())
    adapter(folder, bases(), base_model_name_or_path=str(other))
    refused(run("prepare", "--model", folder), f"{other}, which is an adapter itself", "merge_and_unload()")


def test_pickled_adapter_is_never_opened(peft, bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(run("prepare", "--model", folder), "pickled weights, which are never opened", "adapter_model.safetensors")


@pytest.mark.parametrize("command", ["run", "export", "eval"])
def test_commands_that_take_a_model_folder_say_how_to_get_one(command, bases, run, tmp_path):
    folder = adapter(tmp_path / "adapter", bases())
    more = {"run": ("--prompt", "x"), "export": ("--format", "onnx"), "eval": ()}[command]
    refused(run(command, folder, *more), "is a LoRA adapter of", "merge_and_unload()")


def test_adapter_of_another_model_is_refused_before_anything_is_written(peft, bases, tmp_path):
    folder = adapter(tmp_path / "adapter", bases(), base_model_name_or_path=str(bases(hidden=32)))
    with pytest.raises(CheckpointError, match=r"changes model\.layers.*as a matrix of"):
        open_dense(str(folder))
    assert left_behind() == []
