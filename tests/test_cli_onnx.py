"""`export --format onnx`, `run` and `eval` on an export, as their users meet them: a build of the embedded model."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import Shape, family_config, make_checkpoint, save_random

from sspcompile.checkpoint import check_manifest
from sspcompile.cli.main import main
from sspcompile.cli.run import visible

GOLD = "What is the symbol of gold?"
PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")


def shell(home: Path, *args: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, args)], cwd=home, capture_output=True, text=True, check=False, input=stdin
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A build of the embedded model in two exports."""
    home = tmp_path_factory.mktemp("home")
    # A cut that loses something: divergences of 1e-10 are rounding.
    cut = ("--criterion", "fisher", "--layout", "per-layer", "--keep", "0.25")
    fast = ("--max-tokens", "48", "--continuation-tokens", "8", *cut)
    done = shell(home, "build", "--scenario", "chemistry-helpdesk", *fast, "--out", "artifacts/desk", "-q")
    assert done.returncode == 0, done.stderr
    for precision in ("fp32", "int8"):
        done = shell(home, "export", "--format", "onnx", "--precision", precision, "-q", "--json")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        agreement = json.loads(done.stdout)["agreement"]
        assert agreement["mean_kl"] < 0.05 and (precision != "fp32" or agreement["same_text"])
    return home


@pytest.fixture
def run(run, home, monkeypatch):
    """In the home, wherever a test went in between."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        return run(*args)

    return call


def refused(done: tuple[int, str, str], code: int, *expected: str) -> None:
    assert done[0] == code and done[1] == "" and done[2].startswith("Error: ") and done[2].count("\n") == 1, done
    assert all(text in done[2] for text in expected), done


def test_export_names_its_folder_and_describes_it(home):
    for name in ("desk-onnx", "desk-onnx-int8"):
        out = home / "exported" / name
        manifest = check_manifest(out)
        assert manifest.origin["format"] == "onnx" and manifest.origin["artifact"] == "desk"
        card = (out / "README.md").read_text()
        assert "library_name: onnx" in card and f"sspcompile run {name}" in card
        # Figures of the model before it was rounded are not those of the file.
        assert ("model-index:" in card, "before it was rounded" in card) == ((True, False), (False, True))[
            "int8" in name
        ]
    sizes = [
        (home / "exported" / n / f).stat().st_size
        for n, f in (("desk-onnx", "model.safetensors"), ("desk-onnx-int8", "model.onnx.data"))
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_every_form_of_a_build_writes_the_same_answer(run):
    answers = [run("run", *where, "--prompt", GOLD, "-q") for where in ((), ("exported/desk-onnx",), ("--dense",))]
    assert answers == [(0, " Au\n", "")] * 3
    both = ("-p", GOLD, "-p", "What is 3 plus 6?", "--json")
    built, exported = (
        json.loads(run("run", where, *both)[1])["texts"] for where in ("artifacts/desk", "exported/desk-onnx")
    )
    assert [text["tokens"] for text in built] == [text["tokens"] for text in exported]
    assert exported[1]["text"] == " 9" and exported[0]["first_token_s"] > 0


def test_draws_repeat_with_their_seed_and_differ_without(run):
    def tokens(*more: object) -> tuple[int, ...]:
        args = ("run", "exported/desk-onnx", "-p", "Question: Why", "--raw", "--max-new-tokens", "12", "--json")
        return tuple(json.loads(run(*args, *more)[1])["texts"][0]["tokens"])

    drawn = [tokens("--temperature", 2, "--seed", seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert tokens("--temperature", 2, "--top-p", 1e-6, "--seed", 7) == tokens()


def test_prompt_is_read_from_stdin(home):
    done = shell(home, "run", "exported/desk-onnx", "--prompt", "-", "-q", stdin=GOLD + "\n")
    assert (done.returncode, done.stdout) == (0, " Au\n"), done.stderr


def test_text_streams_to_a_terminal_as_it_is_written(home):
    """A real terminal: the answer comes before the line that says how long it took."""
    leader, follower = pty.openpty()
    command = [*PROGRAM, "run", "exported/desk-onnx", "--prompt", GOLD]
    with subprocess.Popen(command, cwd=home, stdout=follower, stderr=follower, stdin=subprocess.DEVNULL) as running:
        os.close(follower)
        seen = b""
        while chunk := _read(leader):
            seen += chunk
        assert running.wait(timeout=60) == 0
    os.close(leader)
    assert seen.index(b"Au") < seen.index(b"tokens, the first after")


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 4096)
    except OSError:  # Linux answers a read behind the last writer with EIO
        return b""


def test_control_characters_never_reach_the_terminal():
    assert visible("a\x1b[31mb\tc\n\x9b2J\x07") == "a\ufffd[31mb\tc\n\ufffd2J\ufffd"


def test_run_that_waits_for_its_prompt_is_interrupted_with_130(home):
    command = [*PROGRAM, "run", "--prompt", "-"]
    with subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        time.sleep(3)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) == 130
        assert "Traceback" not in running.stderr.read()


def test_eval_asks_the_export_itself(run):
    args = ("--scenario", "chemistry-helpdesk", "--items", "20", "-q", "--json")
    exact, rounded = (json.loads(run("eval", f"exported/desk-onnx{suffix}", *args)[1]) for suffix in ("", "-int8"))
    artifact = json.loads(run("eval", "artifacts/desk", *args)[1])
    assert exact["sliced"]["exact_match"] == artifact["sliced"]["exact_match"]
    kl, its_own, of_int8 = (found["sliced"]["mean_kl"] for found in (exact, artifact, rounded))
    assert kl == pytest.approx(its_own, rel=1e-3)
    assert abs(of_int8 - kl) > 10 * abs(its_own - kl), "the weights of the export itself were asked"


def test_export_of_last_logits_writes_and_does_not_score(run):
    done = run("export", "--format", "onnx", "--last-logits", "--out", "exported/last", "--json", "-q")
    assert done[0] == 0 and json.loads(done[1])["agreement"]["same_text"], done
    assert "last token alone" in Path("exported/last/README.md").read_text()
    assert run("run", "exported/last", "--prompt", GOLD, "-q") == (0, " Au\n", "")
    asked = ("--scenario", "chemistry-helpdesk", "--items", "4", "-q")
    refused(run("eval", "exported/last", *asked), 2, "last token alone", "without --last-logits")


@pytest.fixture(scope="module")
def short(home) -> str:
    """The build once more, for texts of at most 48 tokens."""
    args = ("--format", "onnx", "--context-length", 48, "--out", "exported/short", "-q", "--json")
    done = shell(home, "export", *args)
    assert done.returncode == 0 and json.loads(done.stdout)["context_length"] == 48, done.stderr
    card = (home / "exported" / "short" / "README.md").read_text()
    assert "48 tokens, prompt and answer together" in card and "attention-head-pruning" in card
    assert check_manifest(home / "exported" / "short").origin["context_length"] == 48
    return "exported/short"


def test_eval_of_a_short_context_keeps_to_it_and_says_what_it_read(run, short):
    args = ("eval", short, "--scenario", "chemistry-helpdesk", "--items", "8", "-q", "--json")
    code, out, err = run(*args)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["max_tokens"], found["new_tokens"], found["positions"]) == (24, 24, 48)
    assert found["sliced"]["exact_match"] is not None and found["sliced"]["answer_log_likelihood"] is not None
    code, out, err = run(*args, "--max-tokens", 100, "--max-new-tokens", 8)
    assert code == 0 and json.loads(out)["max_tokens"] == 40
    assert err.startswith("Note: prompts are shortened to 40 tokens") and err.count("\n") == 1
    refused(run(*args, "--max-new-tokens", 48), 2, "no room for a prompt", "at most --max-new-tokens 47")


def test_answer_longer_than_the_context_is_refused_by_eval(run, short, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": GOLD, "answer": "gold " * 80}) + "\n")
    refused(run("eval", short, "--data", data, "-q"), 2, "An answer has", "has 48")


def test_bench_of_a_short_context_takes_loads_that_fit_and_refuses_others(run, short):
    few = ("--repeats", "2", "--processes", "1", "--threads", "1", "-q", "--json")
    code, out, err = run("bench", short, *few)
    assert code == 0, err
    (load,) = json.loads(out)["settings"]["loads"]
    assert load["prompt_tokens"] + load["new_tokens"] == 48 and load["new_tokens"] == 24
    refused(
        run("bench", short, "--prompt-tokens", 47, "--new-tokens", 2, *few), 2, "47 + 2 tokens exceed", "48 positions"
    )


def test_plain_checkpoint_is_exported_as_it_is(run, tmp_path):
    model = make_checkpoint(tmp_path / "model", Shape(family="llama", head_dim=16))
    done = run("export", "--format", "onnx", "--model", model, "--out", tmp_path / "out", "--json", "-q")
    assert done[0] == 0 and json.loads(done[1])["agreement"]["same_text"], done
    assert run("run", tmp_path / "out", "-p", "hello", "--max-new-tokens", "4", "-q")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pruned" not in card and "256 tokens, prompt and answer together" in card


@pytest.mark.parametrize("typed", [".", "../model", "{model}/", "..", "./sub/.."])
def test_export_is_named_after_the_folder_however_it_was_typed(typed, run, tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model", Shape(family="llama", head_dim=16))
    (model / "sub").mkdir()
    monkeypatch.setenv("SSPCOMPILE_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as stop:
        monkeypatch.chdir(model / "sub" if typed == ".." else model)
        main(["export", "--format", "onnx", "--model", typed.format(model=model), "-q"])
    assert not stop.value.code
    (out,) = (tmp_path / "home" / "exported").iterdir()
    assert out.name == "model-onnx"
    assert check_manifest(out).origin["source_name"] == str(model)
    card = (out / "README.md").read_text()
    assert "# model-onnx" in card and "`model` for ONNX Runtime" in card and "base_model" not in card


def test_export_says_what_the_tables_of_a_long_context_take(run, tmp_path):
    config = family_config("llama", head_dim=64, layers=1)
    config.max_position_embeddings = 20_000
    model = save_random(tmp_path / "model", config)
    args = ("export", "--format", "onnx", "--model", model, "--overwrite", "-q", "--out")
    code, _, err = run(*args, tmp_path / "long")
    size = (tmp_path / "long" / "rotary.bin").stat().st_size
    assert code == 0 and size == 2 * 20_000 * 32 * 4
    assert err.startswith(f"Note: {size:,} of the ") and "20,000 tokens" in err and "--context-length" in err
    assert err.count("\n") == 1 and "256 bytes for each" in err
    code, _, err = run(*args, tmp_path / "half", "--precision", "fp16")
    assert code == 0 and (tmp_path / "half" / "rotary.bin").stat().st_size == size // 2 and "128 bytes for each" in err
    assert run(*args, tmp_path / "short", "--context-length", 256)[2] == ""
    assert run("export", "--format", "onnx", "-q", "--overwrite")[2] == ""  # a part too small to be named


REFUSED = {
    "unknown precision": (("--format", "onnx", "--precision", "int3"), "Accepted: fp32, fp16, int8, int4"),
    "precision of another format": (("--precision", "fp16"), "--precision belongs to --format onnx"),
    "host of another format": (("--format", "onnx", "--host", "granite"), "--host belongs to --format hf"),
    "activations of floats": (("--format", "onnx", "--activations", "fp16"), "Add --precision int8 or int4"),
    "blocks of floats": (("--format", "onnx", "--block-size", "64"), "Add --precision int8 or int4"),
    "two sources": (("artifacts/desk", "--format", "onnx", "--model", "embedded"), "exclude each other"),
    "too long a context": (("--format", "onnx", "--context-length", "513", "--out", "new"), "at most 512"),
    "context of another format": (("--context-length", "64"), "--context-length belongs to --format onnx"),
    "inside the artifact": (("--format", "onnx", "--out", "artifacts/desk/model/x"), "lies inside"),
    "it exists": (("--format", "onnx"), "--overwrite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_export_refuses(case, run, home):
    before = sorted(path.as_posix() for path in home.rglob("*"))
    args, message = REFUSED[case]
    refused(run("export", *args, "-q"), 2, message)
    assert sorted(path.as_posix() for path in home.rglob("*")) == before


def test_what_run_refuses(run, home, tmp_path):
    refused(run("run", "nowhere", "-p", "x"), 2, "is neither a build, a cut, an export nor a model folder")
    refused(run("run", "-p", "  "), 2, "prompt is empty")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    refused(run("run", tmp_path, "-p", "x"), 2, "ONNX Runtime cannot open")
    refused(run("run", "exported/desk-onnx", "-p", "x", "--device", "mps"), 2, "no 'mps' provider", "Accepted: cpu")
