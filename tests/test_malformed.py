"""Malformed inputs, each over the real command line: one line that says what is wrong, the exit code, nothing written.

`docs/reliability.md` holds the same table for readers. Every case starts from a good model (or artifact, recipe, file
of prompts) and spoils one thing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, make_checkpoint
from safetensors.numpy import load_file, save_file
from toolkits import SHARED

from sspcompile.cli.main import main

SENTENCE = "Questions about the chemistry of metals"
FAST = ("--keep", "0.5", "--max-tokens", "16", "--continuation-tokens", "1", "--criterion", "fisher")
PLAN = ("plan", "--model", "{in}/model")
BUILD = ("build", "--scenario", SENTENCE, "--model", "{in}/model", *FAST)
WITH_PROMPTS = ("build", "--scenario", "{in}/prompts.txt", "--model", "{in}/model", *FAST)
WITH_RECIPE = ("build", "--scenario", "{in}/recipe.yaml", "--model", "{in}/model", *FAST)
SLICE = ("slice", "--model", "{in}/model", "--mask", "{in}/mask.json", "--out", "{in}/cut")
VERIFY = ("verify", "{in}/artifacts/good", "--model", "{in}/model")


@dataclass(frozen=True)
class Case:
    """`spoil` changes a fresh copy of the good inputs; `args` is then run there."""

    spoil: Callable[[Path], object]
    args: tuple[str, ...]
    says: str
    code: int = 2


def config(**changes: Any) -> Callable[[Path], None]:
    """Change config.json; None removes a key."""

    def spoil(home: Path) -> None:
        path = home / "model" / "config.json"
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return spoil


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Change the tensors themselves: a well-formed file with other contents."""

    def spoil(home: Path) -> None:
        path = home / "model" / "model.safetensors"
        loaded = load_file(path)
        change(loaded)
        save_file(loaded, path, metadata={"format": "pt"})

    return spoil


def header(change: Callable[[dict[str, Any]], object], *, length: int | None = None) -> Callable[[Path], None]:
    """Change the header of the file and nothing behind it; `length` lies about its size."""

    def spoil(home: Path) -> None:
        path = home / "model" / "model.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + size])
        change(value)
        new = json.dumps(value).encode()
        new += b" " * (-len(new) % 8)
        path.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + data[8 + size :])

    return spoil


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Split the model into two shards with an index, and change the index."""

    def spoil(home: Path) -> None:
        folder = home / "model"
        loaded = load_file(folder / "model.safetensors")
        names = sorted(loaded)
        shards = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for file, part in shards.items():
            save_file({name: loaded[name] for name in part}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors").unlink()
        weight_map = {name: file for file, part in shards.items() for name in part}
        change(weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def sharded_and(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(home: Path) -> None:
        index(lambda _: None)(home)
        change(home / "model")

    return spoil


def json_file(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(home: Path) -> None:
        value = json.loads((home / name).read_text()) | changes
        (home / name).write_text(json.dumps(value))

    return spoil


def flipped(name: str) -> Callable[[Path], None]:
    def spoil(home: Path) -> None:
        data = bytearray((home / name).read_bytes())
        data[len(data) // 2] ^= 4
        (home / name).write_bytes(data)

    return spoil


def toolkit_json(**changes: Any) -> Callable[[Path], None]:
    def spoil(home: Path) -> None:
        (folder,) = (home / "artifacts" / "toolkits").iterdir()
        json_file(f"artifacts/toolkits/{folder.name}/toolkit.json", **changes)(home)

    return spoil


def cut_short(name: str, keep: float) -> Callable[[Path], None]:
    def spoil(home: Path) -> None:
        path = home / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return spoil


def duplicated(home: Path) -> None:
    """A tensor in both shards."""
    index(lambda _: None)(home)
    first = load_file(home / "model" / "a.safetensors")
    second = load_file(home / "model" / "b.safetensors")
    name = min(first)
    save_file(second | {name: first[name]}, home / "model" / "b.safetensors", metadata={"format": "pt"})


def vocabulary_of_another(home: Path) -> None:
    path = home / "model" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] = {f"{token}x{number}": number for number, token in enumerate(range(5000))}
    value["added_tokens"] = []
    path.write_text(json.dumps(value))


Q = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model/model.safetensors"


def _nan(loaded: dict[str, np.ndarray]) -> None:
    loaded[Q][0, 0] = np.nan


def _infinite(loaded: dict[str, np.ndarray]) -> None:
    loaded[Q][0, 0] = np.inf


def _overlap(value: dict[str, Any]) -> None:
    names = sorted((n for n in value if n != "__metadata__"), key=lambda n: value[n]["data_offsets"])
    start, stop = value[names[1]]["data_offsets"]
    value[names[1]]["data_offsets"] = [start - 4, stop - 4]


def _yaml(**lines: str) -> str:
    usual = {"schema_version": "1", "name": "mine", "description": "d", "scenario": "{text: about bread}"}
    return "".join(f"{key}: {value}\n" for key, value in (usual | lines).items())


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))

CASES: Mapping[str, Case] = {
    # Weights.
    "weights truncated": Case(cut_short(WEIGHTS, 0.5), PLAN, "header promises"),
    "weights truncated inside the header": Case(cut_short(WEIGHTS, 0.01), PLAN, "truncated"),
    "weights empty": Case(text(WEIGHTS, b""), PLAN, "not a safetensors file, or is truncated"),
    "weights of eight bytes": Case(text(WEIGHTS, b"\0" * 8), PLAN, "unreadable header"),
    "weights longer than promised": Case(
        lambda h: (h / WEIGHTS).write_bytes((h / WEIGHTS).read_bytes() + b"x"), PLAN, "header promises"
    ),
    "header longer than the file": Case(header(lambda _: None, length=1 << 40), PLAN, "truncated"),
    "header that is not valid JSON": Case(
        lambda h: (h / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"{{{{"), PLAN, "unreadable header"
    ),
    "header nested a million deep": Case(
        lambda h: (h / WEIGHTS).write_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6), PLAN, "unreadable header"
    ),
    "offsets that overlap": Case(header(_overlap), PLAN, "wrong offsets at"),
    "offsets that are text": Case(header(lambda v: v[Q].update(data_offsets=["0", "9"])), PLAN, "malformed header"),
    "offsets that are negative": Case(header(lambda v: v[Q].update(data_offsets=[-8, 9])), PLAN, "malformed|offsets"),
    "shape that does not fit its bytes": Case(header(lambda v: v[Q].update(shape=[3, 3])), PLAN, "wrong offsets at"),
    "tensor without a dtype": Case(header(lambda v: v[Q].pop("dtype")), PLAN, "malformed header"),
    "a dtype that nobody knows": Case(header(lambda v: v[Q].update(dtype="F4")), PLAN, "stores .* as F4.*Accepted"),
    "integers as weights": Case(
        tensors(lambda t: t.update({Q: t[Q].astype(np.int32)})), PLAN, "stores .* as I32.*F16, BF16, F32"
    ),
    "quantised weights": Case(
        tensors(lambda t: t.update({Q: t[Q].astype(np.uint8)})), BUILD, "stores .* as U8.*F16, BF16, F32"
    ),
    "a projection of another shape": Case(
        tensors(lambda t: t.update({Q: t[Q][:8]})), PLAN, r"shape \[8, 32\].*asks for \[32, 32\]"
    ),
    "a tensor missing": Case(tensors(lambda t: t.pop(Q)), PLAN, f"lacks the tensor {Q}"),
    "a tensor too many": Case(tensors(lambda t: t.update(spare=t[Q])), PLAN, "holds spare, which .* does not have"),
    "NaN in the weights": Case(tensors(_nan), BUILD, f"infinite or undefined numbers in {Q}"),
    "infinity in the weights": Case(tensors(_infinite), BUILD, f"infinite or undefined numbers in {Q}"),
    # Shards.
    "shard missing": Case(
        sharded_and(lambda m: (m / "b.safetensors").unlink()), PLAN, r"lacks the shard b\.safetensors"
    ),
    "index naming an absent tensor": Case(
        index(lambda m: m.update({"ghost.weight": "a.safetensors"})), PLAN, r"lacks ghost\.weight"
    ),
    "index pointing above its folder": Case(
        index(lambda m: m.update({Q: "../b.safetensors"})), PLAN, r"points to '\.\./b\.safetensors'.*folder itself"
    ),
    "index pointing to an absolute path": Case(
        index(lambda m: m.update({Q: "/etc/passwd"})), PLAN, "points to '/etc/passwd'"
    ),
    "index pointing to a number": Case(index(lambda m: m.update({Q: 7})), PLAN, "points to 7"),
    "tensor in two shards": Case(duplicated, PLAN, "stands in two shards"),
    "index naming a file with escape sequences": Case(
        index(lambda m: m.update({Q: "a\n\x1b[31mb\ud800.safetensors"})), PLAN, r"a\\n\\x1b\[31mb\\ud800"
    ),
    "index without a map": Case(
        sharded_and(lambda m: (m / "model.safetensors.index.json").write_text("{}")), PLAN, "no weight_map"
    ),
    "shard that is a dangling link": Case(
        sharded_and(lambda m: ((m / "b.safetensors").unlink(), (m / "b.safetensors").symlink_to("gone"))),
        PLAN,
        "lacks the shard",
    ),
    "shard that is a folder": Case(
        sharded_and(lambda m: ((m / "b.safetensors").unlink(), (m / "b.safetensors").mkdir())), PLAN, "lacks the shard"
    ),
    "pickled weights": Case(
        lambda h: (h / WEIGHTS).rename(h / "model" / "pytorch_model.bin"), BUILD, "pickled.*never opened.*safetensors"
    ),
    # Configuration.
    "config missing": Case(lambda h: (h / "model" / "config.json").unlink(), PLAN, r"no config\.json"),
    "config empty": Case(text("model/config.json", ""), PLAN, "not valid JSON"),
    "config binary": Case(text("model/config.json", bytes(range(256))), PLAN, "not valid JSON"),
    "config that is a list": Case(text("model/config.json", "[]"), PLAN, "must hold a JSON object"),
    "config nested too deep": Case(text("model/config.json", "[" * 100_000), PLAN, "not valid JSON"),
    "heads as text": Case(config(num_attention_heads="four"), PLAN, "num_attention_heads"),
    "heads negative": Case(config(num_attention_heads=-4), PLAN, "num_attention_heads"),
    "heads zero": Case(config(num_key_value_heads=0), PLAN, "num_key_value_heads"),
    "heads not a multiple of groups": Case(config(num_key_value_heads=3), PLAN, "num_key_value_heads|multiple"),
    "heads that the weights do not have": Case(config(num_attention_heads=8), PLAN, r"shape .*config\.json asks for"),
    "layers absurd": Case(config(num_hidden_layers=10**12), PLAN, "num_hidden_layers"),
    "layers more than the weights have": Case(
        config(num_hidden_layers=3, layer_types=None), PLAN, r"lacks the tensor model\.layers\.2"
    ),
    "layers more than their kinds": Case(config(num_hidden_layers=3), PLAN, "2 layer_types for 3 layers"),
    "a kind of layer that nobody knows": Case(
        config(layer_types=["full_attention", "moon_attention"]), PLAN, "'moon_attention' among its layer_types"
    ),
    "sliding layers without a window": Case(
        config(layer_types=["full_attention", "sliding_attention"]), PLAN, "no sliding_window in force"
    ),
    "window as text": Case(config(use_sliding_window=True, sliding_window="wide"), PLAN, "sliding_window = 'wide'"),
    "positions as a list": Case(config(rope_parameters=[1e4]), PLAN, "rope_parameters must be an object or null"),
    "weights by another name": Case(config(transformers_weights="other.safetensors"), PLAN, "transformers_weights"),
    "hidden size missing": Case(config(hidden_size=None), PLAN, "hidden_size"),
    "hidden size a fraction": Case(config(hidden_size=32.5), PLAN, "hidden_size"),
    "residual multiplier as text": Case(
        config(model_type="granite", residual_multiplier="half"), PLAN, "residual_multiplier must be a finite number"
    ),
    "dense layers that are not a list": Case(
        config(model_type="qwen3_moe", num_experts=2, mlp_only_layers={"0": 1}), PLAN, "mlp_only_layers must list"
    ),
    "model type missing": Case(config(model_type=None), PLAN, "model_type"),
    "model type unknown": Case(config(model_type="nonsense"), PLAN, "nonsense.*Accepted"),
    "architecture that must be refused": Case(config(model_type="olmo2"), PLAN, "q_norm spans all heads"),
    "vocabulary larger than the table": Case(config(vocab_size=9999), PLAN, r"embed_tokens.*asks for \[9999"),
    # Tokenizer.
    "tokenizer missing": Case(
        lambda h: [path.unlink() for path in (h / "model").glob("token*")], BUILD, "no tokenizer"
    ),
    "tokenizer that is not valid JSON": Case(
        text("model/tokenizer.json", "{"), BUILD, r"tokenizer\.json is not valid JSON"
    ),
    "tokenizer of another vocabulary": Case(vocabulary_of_another, BUILD, "tokenizer|vocabulary"),
    # Masks.
    "mask missing": Case(lambda h: (h / "mask.json").unlink(), SLICE, r"mask\.json"),
    "mask that is not valid JSON": Case(text("mask.json", "{"), SLICE, r"mask\.json"),
    "mask of another schema": Case(json_file("mask.json", schema_version=9), SLICE, "schema.version"),
    "mask of another model": Case(
        json_file("mask.json", layers=3, kept=[[0]] * 3, scores=[[1.0] * 4] * 3), SLICE, "The mask is for 3 layers"
    ),
    "mask with a head out of range": Case(json_file("mask.json", kept=[[0, 99], [0]]), SLICE, "99|range|heads"),
    "mask with a head twice": Case(json_file("mask.json", kept=[[0, 0], [0]]), SLICE, "mask|kept"),
    "mask with heads as text": Case(json_file("mask.json", kept=["0", "1"]), SLICE, "mask|kept"),
    # Artifacts and toolkits.
    "artifact with a flipped bit in its weights": Case(
        flipped("artifacts/good/model/model.safetensors"), VERIFY, r"model\.safetensors is not the file that was built"
    ),
    "artifact with a flipped bit in its mask": Case(flipped("artifacts/good/mask.json"), VERIFY, "not the file"),
    "artifact without a manifest": Case(
        lambda h: (h / "artifacts/good/manifest.json").unlink(), VERIFY, r"no manifest\.json"
    ),
    "manifest of another schema": Case(
        json_file("artifacts/good/manifest.json", schema_version=9), VERIFY, "schema version 9"
    ),
    "artifact of another model": Case(
        tensors(lambda t: t.update({Q: t[Q] * 2})), VERIFY, "is not the model that .* was made from"
    ),
    "toolkit of another model": Case(toolkit_json(fingerprint="0" * 64), BUILD, "toolkit.*another model"),
    "toolkit that is not valid JSON": Case(
        lambda h: [p.write_text("{") for p in (h / "artifacts" / "toolkits").glob("*/toolkit.json")], BUILD, "toolkit"
    ),
    # Recipes.
    "recipe with a key twice": Case(text("recipe.yaml", _yaml() + "keep: 0.5\nkeep: 0.6\n"), WITH_RECIPE, "keep"),
    "recipe with aliases that explode": Case(text("recipe.yaml", _yaml() + BOMB), WITH_RECIPE, "recipe|alias"),
    "recipe with an unknown key": Case(text("recipe.yaml", _yaml(kept="0.5")), WITH_RECIPE, "kept"),
    "recipe with a wrong type": Case(text("recipe.yaml", _yaml(keep="[1]")), WITH_RECIPE, "keep"),
    "recipe with a tag of Python": Case(
        text("recipe.yaml", _yaml(name="!!python/object/apply:os.system [id]")), WITH_RECIPE, "recipe"
    ),
    "recipe in another encoding": Case(text("recipe.yaml", _yaml(name="é").encode("utf-16")), WITH_RECIPE, "recipe"),
    "recipe that is binary": Case(text("recipe.yaml", bytes(range(256))), WITH_RECIPE, "recipe"),
    "recipe of ten megabytes": Case(text("recipe.yaml", _yaml() + "#" + "x" * (10 << 20)), WITH_RECIPE, "recipe"),
    "recipe that is empty": Case(text("recipe.yaml", ""), WITH_RECIPE, "recipe"),
    "recipe that is a list": Case(text("recipe.yaml", "- a\n- b\n"), WITH_RECIPE, "recipe"),
    # Prompts.
    "prompts empty": Case(text("prompts.txt", ""), WITH_PROMPTS, "no prompts"),
    "prompts of white space": Case(text("prompts.txt", " \n\t\n"), WITH_PROMPTS, "no prompts"),
    "prompts binary": Case(text("prompts.txt", bytes(range(256)) * 9), WITH_PROMPTS, "binary"),
    "prompts in another encoding": Case(
        text("prompts.txt", "Wie heißt Gold?\n".encode("latin-1")), WITH_PROMPTS, "UTF-8|utf-8"
    ),
    "prompts file missing": Case(lambda h: (h / "prompts.txt").unlink(), WITH_PROMPTS, "no file"),
    "prompts that are a folder": Case(
        lambda h: ((h / "prompts.txt").unlink(), (h / "prompts.txt").mkdir()), WITH_PROMPTS, "no file|is a folder"
    ),
    "prompts with a line of more than a megabyte": Case(
        text("prompts.txt", "What is " + "gold and " * 120_000 + "silver?\n"), WITH_PROMPTS, "line 1 is longer than"
    ),
    "prompts with control characters": Case(
        text("prompts.txt", "What is lead?\nWhat is \x1b[31mred\x07 gold?\n"),
        WITH_PROMPTS,
        r"line 2 must not hold the control character U\+001B",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, toolkits) -> Path:
    """A model with its toolkit, a build of it, its mask, prompts and a recipe."""
    home = tmp_path_factory.mktemp("good")
    toolkits.put(home, make_checkpoint(home / "model", Shape()), **SHARED)
    (home / "prompts.txt").write_text("".join(f"What is {n} plus {n}?\n" for n in range(8)))
    (home / "recipe.yaml").write_text(_yaml())
    before = os.environ.get("SSPCOMPILE_HOME")
    os.environ["SSPCOMPILE_HOME"] = str(home)
    try:
        arguments = ["build", "--scenario", SENTENCE, "--model", str(home / "model"), *FAST, "-q"]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(home / "artifacts" / "good")])
    finally:
        os.environ.pop("SSPCOMPILE_HOME") if before is None else os.environ.update(SSPCOMPILE_HOME=before)
    assert not stop.value.code
    shutil.copyfile(home / "artifacts" / "good" / "mask.json", home / "mask.json")
    return home


def files(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in home.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_input_is_told_in_one_line_and_nothing_is_written(name, good, tmp_path, monkeypatch, capfd):
    case, home = CASES[name], tmp_path / "home"
    shutil.copytree(good, home, symlinks=True)
    case.spoil(home)
    before = files(home)
    monkeypatch.chdir(home)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("{in}", str(home)) for argument in case.args])
    out, err = capfd.readouterr()
    assert int(stop.value.code or 0) == case.code, (stop.value.code, out, err)
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert err.endswith("\n") and len(errors) == 1 and "Traceback" not in err, err
    assert out == "" and len(errors[0]) < 1000, err[:2000]
    assert re.search(case.says, errors[0]), err
    assert files(home) == before


ACCEPTED = {
    "a line of nearly a megabyte": "What is " + "gold and " * 110_000 + "silver?\nWhat is lead?\n",
    "any language": "什么是金？\nЧто такое золото?\nما هو الذهب؟\n🥇?\nWas heißt „Gold“?\n",
    "ends of lines as on Windows": "What is gold?\r\nWhat is lead?\r\n",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_strange_prompts_are_taken_as_they_are(name, good, tmp_path, monkeypatch, capfd):
    home = tmp_path / "home"
    shutil.copytree(good, home)
    (home / "prompts.txt").write_text(ACCEPTED[name], "utf-8", newline="")
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("{in}", str(home)) for argument in (*WITH_PROMPTS, "-q", "--out", "artifacts/strange")])
    out, err = capfd.readouterr()
    assert not stop.value.code, err
    assert "\x1b" not in out and "\x07" not in out
    page = (home / "artifacts" / "strange" / "report.html").read_text("utf-8")
    assert "\x1b" not in page and len(page) < 1 << 20


def test_the_table_is_as_long_as_promised():
    assert len(CASES) >= 60


def test_the_documents_list_every_case():
    documents = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text("utf-8")
    assert [name for name in CASES if name not in documents] == []
