"""Killed at random moments, `build` and `export` leave nothing that looks finished; full disks and the like are told.

Minutes of whole commands, so they run through `make test-kills`; the seeds make the moments repeatable as far as a
machine's speed is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint

from sspcompile.checkpoint import check_manifest
from sspcompile.errors import ArtifactError

PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")
FAST = ("--max-tokens", "24", "--continuation-tokens", "4", "--criterion", "fisher", "-q")
BUILD = ("build", "--scenario", "Questions about the chemistry of metals", "--model", "model", "--keep", "0.5", *FAST)
EXPORT = ("export", "good", "--format", "onnx", "-q")
KILLS = 25

pytestmark = pytest.mark.slow


def environment(home: Path) -> dict[str, str]:
    """Temporary files of the run lie where they can be seen."""
    (home / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1"}


def start(home: Path, *args: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, args)],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(home: Path, *args: object) -> tuple[int, str, str]:
    process = start(home, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, its toolkit and a finished build."""
    home = tmp_path_factory.mktemp("home")
    shape = Shape(family="qwen2", layers=3, hidden=64, kv_heads=4, group_size=2, head_dim=16, shard_bytes=100_000)
    make_checkpoint(home / "model", shape)
    code, _, err = finish(home, *BUILD, "--out", "artifacts/good")
    assert code == 0, err
    return home


def strays(folder: Path, known: set[str]) -> set[str]:
    """What lies in `folder` beyond what is known, one level deep."""
    return {path.name for path in folder.iterdir()} - known if folder.is_dir() else set()


@pytest.mark.parametrize("what", ["build", "export"])
def test_killed_at_random_moments_nothing_looks_finished_and_the_next_run_succeeds(what, home):
    place, out, command = {
        "build": (home / "artifacts", "killed", (*BUILD, "--out", "artifacts/killed")),
        "export": (home / "exported", "good-onnx", EXPORT),
    }[what]
    known = {path.name for path in place.iterdir()} if place.is_dir() else set()
    begin = time.monotonic()
    code, _, err = finish(home, *command)
    assert code == 0, err
    usual = time.monotonic() - begin
    whole = home / "whole"
    shutil.copytree(place / out, whole)
    moments = random.Random(7)
    left_behind = finished = 0
    for number in range(KILLS):
        # Each kill meets an empty place or, every other time, a finished folder that is being replaced.
        replacing = number % 2 == 1
        shutil.rmtree(place / out, ignore_errors=True)
        if replacing:
            shutil.copytree(whole, place / out)
        process = start(home, *command, *(("--overwrite",) if replacing else ()))
        time.sleep(moments.uniform(0.0, usual))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        new = strays(place, known | {out})
        assert all(
            name.startswith((f".partial-{out}-", f".replaced-{out}-", ".partial-last", ".unfinished-")) for name in new
        ), new
        left_behind += bool(new)
        assert strays(home / "tmp", set()) == set(), "nothing outside of the partial folder"
        if (place / out).exists():
            check_manifest(place / out)
            finished += 1
        elif replacing:
            # Between its two renames the old folder is whole under the name that the next run puts back or removes.
            assert any(name.startswith(f".replaced-{out}-") for name in new)
            for path in place.glob(f".replaced-{out}-*"):
                check_manifest(path)
    shutil.rmtree(whole)
    code, _, err = finish(home, *command, "--overwrite")
    assert code == 0, err
    check_manifest(place / out)
    assert strays(place, known | {out}) == set(), "the next run removes what the killed ones left"
    assert strays(home / "tmp", set()) == set()
    print(json.dumps({"command": what, "kills": KILLS, "partial folders left": left_behind, "finished": finished}))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_and_an_end_are_clean(number, code, home):
    process = start(home, *BUILD, "--out", "artifacts/stopped")
    deadline = time.monotonic() + 60
    while not list((home / "artifacts").glob(".partial-stopped-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (process.returncode, err)
    assert out == b"" and b"Traceback" not in err
    assert not list((home / "artifacts").glob("*stopped*"))
    assert strays(home / "tmp", set()) == set()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, so small that a build does not fit."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "command",
    [(*BUILD, "--out", "disk/new"), (*EXPORT, "--out", "disk/new"), ("export", "good", "--out", "disk/new")],
    ids=["build", "onnx", "hf"],
)
def test_a_full_disk_is_told_and_nothing_half_written_stays(command, home):
    with small_disk(home / "disk", "64k") as disk:
        source = {path: path.read_bytes() for path in (home / "model").iterdir()}
        code, out, err = finish(home, *command)
        assert code in (1, 2) and out == "" and err.count("\n") == 1, err
        assert "No space left on device" in err, err
        assert list(disk.iterdir()) == []
        assert source == {path: path.read_bytes() for path in (home / "model").iterdir()}
    (home / "disk").rmdir()


def test_an_output_on_another_file_system_is_no_matter(home):
    with small_disk(home / "disk", "8m"):
        code, _, err = finish(home, "export", "good", "--format", "onnx", "--hard-link", "-q", "--out", "disk/new")
        assert code == 0, err
        check_manifest(home / "disk" / "new")
        code, _, err = finish(home, *BUILD, "--out", "disk/built")
        assert code == 0, err
    (home / "disk").rmdir()


def test_a_read_only_place_is_told(home):
    if os.geteuid() == 0:
        with small_disk(home / "disk", "8m") as disk:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            code, out, err = finish(home, *BUILD, "--out", "disk/new")
            assert code == 2 and out == "" and "Read-only file system" in err and "--out" in err, err
        (home / "disk").rmdir()
        return
    place = home / "closed"
    place.mkdir(mode=0o555)
    code, out, err = finish(home, *BUILD, "--out", "closed/new")
    assert code == 2 and out == "" and "Permission denied" in err and "--out" in err, err
    place.rmdir()


def test_a_toolkit_that_vanishes_is_made_again(home):
    for path in (home / "artifacts" / "toolkits").iterdir():
        subprocess.run(["rm", "-r", str(path)], check=True)
    code, _, err = finish(home, *BUILD, "--out", "artifacts/again")
    assert code == 0, err
    assert list((home / "artifacts" / "toolkits").iterdir())


def test_a_killed_prepare_goes_on_with_what_it_had_measured(home):
    toolkits = home / "artifacts" / "toolkits"
    prepare = ("prepare", "--model", "model", *FAST)
    for path in toolkits.iterdir():
        shutil.rmtree(path)
    process = start(home, *prepare)
    deadline = time.monotonic() + 60
    while not list(toolkits.glob(".unfinished-*/features-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [path.name[:12] for path in toolkits.iterdir()] == [".unfinished-"]
    # It goes on there: a stage that cannot be read would be told.
    stage = next(toolkits.glob(".unfinished-*/features-*.safetensors"))
    whole = stage.read_bytes()
    stage.write_bytes(whole[:100])
    code, _, err = finish(home, *prepare)
    assert code == 2 and stage.name in err and err.count("\n") == 1
    stage.write_bytes(whole)
    code, _, err = finish(home, *prepare)
    assert code == 0, err
    assert [path.name for path in toolkits.iterdir() if path.name.startswith(".")] == []


def test_two_builds_at_once_do_not_spoil_each_other(home):
    """Same model, same cache, same output: one wins, the other says why."""
    first, second = (start(home, *BUILD, "--out", "artifacts/both") for _ in range(2))
    results = [(process.communicate(timeout=300), process.returncode) for process in (first, second)]
    codes = sorted(code for _, code in results)
    assert codes == [0, 2], results
    loser = next(err for (_, err), code in results if code == 2).decode()
    assert "exists and is kept" in loser and "--overwrite" in loser
    check_manifest(home / "artifacts" / "both")
    assert strays(home / "artifacts", {path.name for path in (home / "artifacts").glob("[!.]*")}) == set()


def test_a_reader_during_a_rebuild_sees_a_whole_artifact(home):
    """Until the new one is there, the old one is: what is read at any moment is complete."""
    assert finish(home, *BUILD, "--out", "artifacts/read")[0] == 0
    process = start(home, *BUILD, "--out", "artifacts/read", "--overwrite")
    seen = 0
    while process.poll() is None:
        try:
            check_manifest(home / "artifacts" / "read")
        except ArtifactError:  # the moment between the two renames: looking again is enough
            time.sleep(0.2)
            check_manifest(home / "artifacts" / "read")
        seen += 1
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()
    assert seen > 5
    check_manifest(home / "artifacts" / "read")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_build_twice_is_the_same_bytes(threads, home):
    """Manifests hold the sha256 of every file, so two equal manifests are two equal artifacts."""
    manifests = []
    for number in (1, 2):
        out = home / "artifacts" / f"same-{threads}-{number}" / "x"
        process = subprocess.run(
            [*PROGRAM, *BUILD, "--out", str(out)],
            cwd=home,
            capture_output=True,
            check=False,
            env=environment(home) | {"OMP_NUM_THREADS": threads},
        )
        assert process.returncode == 0, process.stderr
        manifests.append((out / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[0])["origin"]["seed"] == 0
