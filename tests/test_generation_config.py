"""A generation_config.json that cannot be read is told in one line by every command, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import family_config, save_random

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.settings import read_generation
from sspcompile.cli.main import main

NAME = "generation_config.json"
BROKEN: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{ eos", "is not valid JSON"),
    "half a file": (b'{"eos_token_id": [257', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "bytes": (b"\xff\xfe\x00", "is not valid JSON"),
    "too deep": (b"[" * 100_000, "is not valid JSON"),
    "a list": (b"[257]", "must hold a JSON object"),
    "null": (b"null", "must hold a JSON object"),
    "text as end token": (b'{"eos_token_id": "</s>"}', "'</s>' as eos_token_id"),
    "text among end tokens": (b'{"eos_token_id": [257, "</s>"]}', "as eos_token_id"),
    "fraction as end token": (b'{"eos_token_id": 257.0}', "257.0 as eos_token_id"),
    "truth as end token": (b'{"eos_token_id": true}', "True as eos_token_id"),
    "object as end token": (b'{"eos_token_id": {"id": 257}}', "as eos_token_id"),
    "text as padding": (b'{"pad_token_id": "<pad>"}', "'<pad>' as pad_token_id"),
    "list as padding": (b'{"pad_token_id": [258]}', "[258] as pad_token_id"),
    "list as beginning": (b'{"bos_token_id": [256]}', "[256] as bos_token_id"),
}
FINE = ("{}", '{"eos_token_id": null}', '{"eos_token_id": [7, 9]}', '{"eos_token_id": 7, "pad_token_id": null}')


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """A model, an export of it, and a mask that fits it."""
    folder = tmp_path_factory.mktemp("good")
    model = save_random(folder / "model", family_config("llama", layers=2), seed=3)
    with pytest.raises(SystemExit) as stop:
        main(["export", "--format", "onnx", "--model", str(model), "--out", str(folder / "onnx"), "-q"])
    assert not stop.value.code
    g = Checkpoint(model).geometry
    kept = [list(range(g.heads // 2))] * g.layers
    mask = {
        "schema_version": 1,
        "model": "",
        "layers": g.layers,
        "heads": g.heads,
        "kv_heads": g.kv_heads,
        "kept": kept,
        "layout": "uniform",
        "keep_requested": 0.5,
        "keep_achieved": 0.5,
        "scores": [[1.0] * g.heads] * g.layers,
        "whitelist": [],
        "criterion": "kl",
        "scenario": {"name": "x"},
    }
    (folder / "mask.json").write_text(json.dumps(mask))
    (folder / "questions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return {"model": model, "onnx": folder / "onnx", "mask": folder / "mask.json", "data": folder / "questions.jsonl"}


COMMANDS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "--model", "{model}", "--keep", "0.5"),
    "build": ("build", "--scenario", "chemistry-helpdesk", "--model", "{model}"),
    "slice": ("slice", "--mask", "{mask}", "--model", "{model}", "--any-model", "--out", "{out}/cut"),
    "run": ("run", "{model}", "--prompt", "x"),
    "run of an export": ("run", "{onnx}", "--prompt", "x"),
    "export": ("export", "--format", "onnx", "--model", "{model}", "--out", "{out}/onnx"),
    "eval": ("eval", "{model}", "--against", "{dense}", "--data", "{data}"),
    "eval against it": ("eval", "{dense}", "--against", "{model}", "--data", "{data}"),
    "bench": ("bench", "{model}", "--model", "{dense}", "--quick"),
    "bench against it": ("bench", "{dense}", "--model", "{model}", "--quick"),
}


@pytest.mark.parametrize("broken", ["no JSON", "a list", "text as end token", "list as padding"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_in_one_line(command, broken, good, tmp_path, monkeypatch, capfd):
    content, message = BROKEN[broken]
    places = {"out": tmp_path / "out", "dense": good["model"], "mask": good["mask"], "data": good["data"]}
    for name in ("model", "onnx"):
        places[name] = tmp_path / name
        places[name].mkdir()
        for file in good[name].iterdir():
            (places[name] / file.name).write_bytes(file.read_bytes())
        (places[name] / NAME).write_bytes(content)
    monkeypatch.setenv("SSPCOMPILE_HOME", str(tmp_path / "home"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([part.format(**places) for part in COMMANDS[command]] + ["-q"] * (command != "plan"))
    said = capfd.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1), said
    assert said.err.startswith("Error: ") and NAME in said.err and message in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", BROKEN)
def test_every_way_to_break_it_is_found_by_whoever_opens_the_folder(broken, tmp_path, capfd, good):
    content, message = BROKEN[broken]
    for file in good["model"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path), "-p", "x", "-q"])
    said = capfd.readouterr()
    assert stop.value.code == 2 and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("content", FINE)
def test_what_transformers_takes_is_taken(content, tmp_path):
    assert read_generation(tmp_path) is None
    (tmp_path / NAME).write_text(content)
    assert read_generation(tmp_path) == json.loads(content)
