"""A build that is interrupted, anywhere, and run again: the artifact of an undisturbed one, byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import Shape, make_checkpoint
from click.testing import CliRunner

import sspcompile
from sspcompile.cli.main import cli
from sspcompile.cli.options import GOING_ON
from sspcompile.model import journal

OPTIONS = {"max_tokens": 16, "continuation_tokens": 8, "keep": 0.5}
FLAGS = ("--max-tokens", "16", "--continuation-tokens", "8", "--keep", "0.5")
SCENARIO = "Questions about the chemistry of metals"
COMMAND = ("build", "--scenario", SCENARIO, "--model", "model", *FLAGS)


@pytest.fixture(autouse=True)
def _write_at_once(monkeypatch):
    monkeypatch.setattr(journal, "SECONDS", 0.0)


@contextlib.contextmanager
def layer_calls():
    """How often decoder layers were run, those of models that are loaded meanwhile included."""
    count = [0]

    def hook(module, _inputs):
        count[0] += type(module).__name__.endswith("DecoderLayer")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def build(home: Path, progress) -> tuple[bytes, int]:
    """The manifest, and how many layer calls it took."""
    with contextlib.chdir(home), layer_calls() as calls:  # the path of the model stands in the recipe
        artifact = sspcompile.build("model", SCENARIO, progress=progress, **OPTIONS)
    return (home / artifact.path / "manifest.json").read_bytes(), calls[0]


def without_builds(home: Path) -> None:
    """The home with its model and toolkit alone; manifests name paths, so it is the same one for all."""
    for path in (home / "artifacts").iterdir():
        if path.is_dir() and path.name != "toolkits":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A model with its toolkit, the steps that a build tells, its manifest, and the layer calls that it takes."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(family="qwen2", layers=3, hidden=32, kv_heads=2, group_size=2, head_dim=8))
    with contextlib.chdir(home):
        sspcompile.plan("model", SCENARIO, **OPTIONS)  # prepares the toolkit
    steps = []
    manifest, calls = build(home, lambda *step: steps.append(step))
    return home, steps, manifest, calls


# One after the other, as far as each run comes: (stage, step at whose end it is interrupted).
PLACES = (
    ("continuations", 1),
    ("head scores", 1),
    ("repair (masks to compare)", 2),
    ("comparing masks", 3),
    ("repair (this build and its baselines)", 1),
    ("repair (this build and its baselines)", 2),
    ("proving", 0),
)


def interrupt_at(place, told):
    def progress(stage, done, total):
        told.append((stage, done, total))
        if (stage, done) == place:
            raise KeyboardInterrupt

    return progress


def test_a_build_that_is_interrupted_again_and_again_writes_the_same_bytes(undisturbed):
    home, steps, manifest, calls = undisturbed
    without_builds(home)
    artifacts, spent = home / "artifacts", []
    for place in PLACES:
        assert any(step[:2] == place for step in steps), place
        told = []
        with layer_calls() as count, pytest.raises(KeyboardInterrupt):
            build(home, interrupt_at(place, told))
        spent.append(count[0])
        (left,) = (path for path in artifacts.iterdir() if path.name not in ("toolkits", "last"))
        assert left.name.startswith(".unfinished-") and journal.holds_work(left)
    told = []
    again, last = build(home, lambda *step: told.append(step))
    assert again == manifest
    assert {path.name.startswith(".") for path in artifacts.iterdir()} == {False}, "a finished build keeps nothing"
    assert last < calls / 2, "the search is not repeated"
    fits = [step[1:] for step in told if step[0].startswith("repair (")]
    assert all(done == total for done, total in fits), "no layer is fitted again"
    # The dense model's logits, and how its layers are called, are measured anew by every run.
    assert sum((*spent, last)) < 3 * calls


def test_another_request_goes_on_with_nothing_and_spoils_nothing(undisturbed, tmp_path, monkeypatch):
    home, _, manifest, _ = undisturbed
    without_builds(home)
    with pytest.raises(KeyboardInterrupt):
        build(home, interrupt_at(("comparing masks", 3), []))
    (left,) = (home / "artifacts").glob(".unfinished-*")
    before = {path.name: path.read_bytes() for path in left.glob("*.safetensors")}
    with contextlib.chdir(home):
        sspcompile.build("model", SCENARIO, out=tmp_path / "other", **OPTIONS | {"keep": 0.75})
    assert {path.name: path.read_bytes() for path in left.glob("*.safetensors")} == before
    assert list((home / "artifacts").glob(".unfinished-*")) == [left]
    monkeypatch.chdir(home)
    said = CliRunner().invoke(cli, COMMAND)
    assert said.exit_code == 0 and said.stderr.splitlines()[0] == GOING_ON, said.output
    assert (next((home / "artifacts").glob("*/manifest.json"))).read_bytes() == manifest
    assert not left.exists()
    said = CliRunner().invoke(cli, [*COMMAND, "--overwrite"])
    assert said.exit_code == 0 and GOING_ON not in said.output


def program(home: Path) -> subprocess.Popen[bytes]:
    """The command, in a process of its own that keeps whatever it can."""
    at_once = (
        "from sspcompile.model import journal; journal.SECONDS = 0.0; from sspcompile.cli.main import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", at_once, *COMMAND],
        cwd=home,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def killed_when(home: Path, found: str) -> None:
    """A build that is killed as soon as a file of that pattern lies among what it keeps."""
    process, deadline = program(home), time.monotonic() + 120
    while not list((home / "artifacts").glob(f".unfinished-*/{found}")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def hidden(home: Path) -> bool:
    """Whether nothing in the artifacts looks finished."""
    return {path.name for path in (home / "artifacts").iterdir() if path.name[0] != "."} <= {"toolkits", "last"}


def test_a_killed_build_goes_on_where_it_was_killed(undisturbed):
    home, _, manifest, calls = undisturbed
    without_builds(home)
    killed_when(home, "state-*.safetensors")
    assert hidden(home)
    again, last = build(home, lambda *_: None)
    assert again == manifest and last < calls


@pytest.mark.slow
def test_a_build_that_is_killed_at_random_moments_writes_the_same_bytes(undisturbed):
    home, _, manifest, _ = undisturbed
    without_builds(home)
    moments = random.Random(5)
    for _ in range(12):
        process = program(home)
        time.sleep(moments.uniform(2.0, 12.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not hidden(home):  # it was faster
            assert next((home / "artifacts").glob("*/manifest.json")).read_bytes() == manifest
            without_builds(home)
    assert build(home, lambda *_: None)[0] == manifest
    assert hidden(home) is False and not [*(home / "artifacts").glob(".*")]


@pytest.mark.slow
def test_two_builds_of_one_request_at_once_write_the_same_bytes(undisturbed):
    home, _, manifest, _ = undisturbed
    without_builds(home)
    killed_when(home, "state-*.safetensors")
    first, second = program(home), program(home)
    ends = [(process.communicate()[1], process.returncode) for process in (first, second)]
    assert sorted(code for _, code in ends) == [0, 2], ends
    assert next((home / "artifacts").glob("*/manifest.json")).read_bytes() == manifest
    assert not [*(home / "artifacts").glob(".*")]


def test_stages_that_run_the_model_tell_every_step(undisturbed):
    _, steps, _, _ = undisturbed
    fewest = {"comparing masks": 3, "proving": 5, "repair (masks to compare)": 3, "head scores": 1}
    for stage, least in fewest.items():
        told = [step[1:] for step in steps if step[0] == stage]
        assert len(told) >= least, stage
        for (done, total), (later, _) in itertools.pairwise(told):
            # Prompts of one length are proven together; nothing else takes two steps at a time.
            assert later == (done + 1 if done < total else 1) or (stage == "proving" and done < later <= total), stage
        assert told[-1][0] == told[-1][1], stage
