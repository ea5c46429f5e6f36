"""What an argument names, and what is said where it cannot be taken: the next thing to type has to work."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from builders import family_config, save_random
from ggufs import source, write_gguf
from refusals import refused

from sspcompile.api.arguments import Named, cut_model, demand, demand_transformers, named, with_dense
from sspcompile.api.bench import BenchRequest
from sspcompile.cli.run import _read
from sspcompile.errors import ArtifactError, InputError
from sspcompile.model.llama_session import has_llama_cpp
from sspcompile.report.json import read_report
from sspcompile.request.amounts import largest_within
from sspcompile.slicing.mask import dump_mask, whole_mask
from sspcompile.workspace import MASK, Workspace


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, the same as a GGUF file, and a cut of it that keeps everything."""
    from sspcompile.cli.main import main

    home = tmp_path_factory.mktemp("home")
    write_gguf(source(home / "model", "llama"), home / "tiny.f32.gguf")
    (home / "mask.json").write_text(dump_mask(whole_mask(2, 4, 2)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(home)
        main(["slice", "--model", "model", "--mask", "mask.json", "--any-model", "--out", "cut", "-q"])
    assert not stop.value.code
    return home


@pytest.fixture
def inside(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_a_gguf_file_is_a_model_wherever_one_is_named(run, inside):
    found = named("tiny.f32.gguf", Workspace(inside))
    assert (found.kind, found.name, found.typed) == ("model", "tiny.f32", "tiny.f32.gguf")
    assert named("./tiny.f32.gguf", Workspace(inside)).name == "tiny.f32"
    code, out, err = run("run", "tiny.f32.gguf", "--prompt", "What is", "--max-new-tokens", "2", "--json")
    assert code == 0 and len(json.loads(out)["texts"][0]["tokens"]) == 2, err
    asked = ("eval", "tiny.f32.gguf", "--against", "model", "--data", "asked.jsonl", "--max-new-tokens", "2", "--json")
    Path("asked.jsonl").write_text('{"prompt": "What is the answer?", "answer": "seven"}\n')
    code, out, err = run(*asked)
    assert code == 0 and json.loads(out)["sliced"]["mean_kl"] == 0, err


def test_the_file_of_a_gguf_export_stands_for_the_export(run, inside):
    code, _, err = run("export", "--model", "tiny.f32.gguf", "--format", "gguf", "-q")
    assert code == 0, err
    file = Path("exported/tiny.f32-gguf/model.gguf")
    found = named(str(file), Workspace(inside))
    assert (found.kind, found.folder) == ("export", file.parent) and found.gguf
    with pytest.raises(InputError, match="is a GGUF export, and eval --lm-eval runs models in transformers"):
        demand_transformers(found, "eval --lm-eval")
    refused(run("export", str(file), "--format", "onnx"), "is a GGUF export already")


@pytest.mark.skipif(has_llama_cpp(), reason="llama.cpp is here")
def test_without_llama_cpp_nothing_is_timed_in_it(run, inside):
    code, _, err = run("export", "--model", "tiny.f32.gguf", "--format", "gguf", "--out", "timed", "-q")
    assert code == 0, err
    refused(run("bench", "timed"), "llama.cpp is not installed", "sspcompile[gguf]")
    refused(run("bench", "cut", "--model", "model", "--runtimes", "hf,gguf"), "llama.cpp is not installed")
    refused(run("bench", "cut", "--runtimes", "llama.cpp"), "There is no runtime 'llama.cpp'", "hf, onnx, gguf")


def test_without_onnx_runtime_nothing_is_timed_in_it(run, inside, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else there(name, *rest)
    )
    refused(
        run("bench", "cut", "--model", "model", "--runtimes", "onnx"),
        "ONNX Runtime is not installed",
        "sspcompile[cpu]",
    )


def test_llama_cpp_is_timed_on_the_processor_one_text_at_a_time(inside):
    assert BenchRequest().settings(512, {"hf", "gguf"}).device == "cpu"
    with pytest.raises(InputError, match="one text at a time"):
        BenchRequest(batch=(1, 2)).settings(512, {"gguf"})


def test_the_hint_of_a_refusal_names_what_the_command_has(run, inside):
    refused(run("run", "model", "--prompt", "a", "--dense"), "does not say what it was cut from", "run MODEL`")
    refused(run("export", "cut", "--format", "hf"), "transformers and vLLM load it as it is")
    refused(run("eval", "cut", "--lm-eval", "some_task", "--data", "asked.jsonl"), "--data does not go with --lm-eval")
    refused(run("plan", "--from", "cut", "--size", "0.5"), "--size does not go with --from")
    with pytest.raises(InputError) as told:
        demand(named("cut", Workspace(inside)), "build", command="compare")
    assert told.value.hint == "It takes a build."


def test_a_refusal_names_the_command_that_was_typed_and_no_other(tmp_path):
    with pytest.raises(InputError, match="`sspcompile eval` does not take it"):
        with_dense(Named("nested", tmp_path, tmp_path), None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "nested.json").write_text("{}")
    for command in ("eval", "bench"):
        with pytest.raises(InputError, match=f"`sspcompile {command}` does not take it"):
            cut_model(str(tmp_path), None, Workspace(tmp_path), option="--model", command=command)


@pytest.mark.parametrize("share", [0.0, -1.0, 70.0, float("nan")])
def test_one_of_several_sizes_is_asked_for_by_a_share(share):
    with pytest.raises(InputError, match="is not a share of the parameters"):
        largest_within([1.0, 0.9], share, "the nested artifact")


def test_the_last_build_is_the_one_among_the_artifacts_not_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(Path())
    for folder in (workspace.artifact("mine"), Path("mine"), Path("elsewhere")):
        folder.mkdir(parents=True)
        (folder / MASK).write_text("{}")
    workspace.remember(workspace.artifact("mine"))
    assert workspace.last() == workspace.artifact("mine")
    workspace.remember(Path("elsewhere"))
    assert workspace.last() == tmp_path / "elsewhere"
    (tmp_path / "elsewhere" / MASK).unlink()
    with pytest.raises(ArtifactError, match="is gone"):
        workspace.last()


@pytest.mark.parametrize("typed", [b"one\ntwo\n", b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\r\ntwo"])
def test_a_prompt_on_stdin_is_the_same_from_every_shell(typed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert _read("-") == "one\ntwo"


def test_a_build_that_cannot_be_repaired_says_why(run, tmp_path, monkeypatch):
    """A norm behind o_proj: something was removed, and least squares would not know what to aim at."""
    save_random(tmp_path / "model", family_config("gemma2", layers=2))
    (tmp_path / "asked.txt").write_text("".join(f"What is {n} plus {3 * n}?\r\n" for n in range(32)))
    (tmp_path / "asked.yaml").write_text(
        "{schema_version: 1, name: sums, description: Sums., scenario: {prompts_file: asked.txt, domains: {math: 1}}}"
    )
    monkeypatch.chdir(tmp_path)
    fast = ("--layout", "per-layer", "--max-tokens", 16, "--continuation-tokens", 0, "--baselines", "none", "-q")
    code, _, err = run("build", "-s", "asked.yaml", "-m", "model", "--keep", 0.5, "--out", "cut", *fast)
    assert code == 0 and "There is no repair" in err, err
    repair = read_report(tmp_path / "cut" / "report.json").repair
    assert repair is not None and not repair.used and "a norm stands between" in str(repair.reason)
