"""`bench`, `compare` and `build --sweep` as their users meet them, on small models with real tokenizers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint, stated
from commands import inside

from sspcompile.checkpoint import check_manifest

PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")
FAST = ("--max-tokens", "24", "--continuation-tokens", "4", "--criterion", "fisher")
BUILD = ("build", "--scenario", "sums.yaml", "--model", "dense", *FAST, "-q")
SHORT = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "3", "--processes", "3", "--threads", "1", "-q")


def shell(home: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, args)], cwd=home, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model and two builds of it, one in each layout."""
    home = tmp_path_factory.mktemp("home")
    stated(home / "sums.yaml")
    make_checkpoint(home / "dense", Shape(family="llama", layers=3, hidden=64, kv_heads=4, group_size=2, head_dim=16))
    for layout, keep in (("uniform", "0.5"), ("per-layer", "0.75")):
        done = inside(home, *BUILD, "--layout", layout, "--keep", keep, "--out", f"artifacts/{layout}")
        assert done.code == 0, done.err
    return home


@pytest.fixture
def run(run, home, monkeypatch):
    """In the home, wherever a test went in between."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        return run(*args)

    return call


@pytest.mark.whole
def test_two_artifacts_in_two_runtimes_under_two_loads(run, home):
    code, out, err = run(
        "bench", "uniform", "per-layer", "--runtimes", "hf,onnx", "--batch", "1,2", "--memory", "1MB", "--json", *SHORT
    )
    assert code == 0 and err == "", err
    found = json.loads(out)
    names = [contender["name"] for contender in found["contenders"]]
    assert names == ["dense, hf", "dense, onnx", "uniform, hf", "uniform, onnx", "per-layer, hf", "per-layer, onnx"]
    for contender in found["contenders"]:
        assert [load["load"]["batch"] for load in contender["loads"]] == [1, 2]
        assert len(contender["loads"][1]["metrics"]["prefill_seconds"]["samples"]) == 3
        assert contender["loads"][0]["roofline"]["bytes_per_step"] > 0
    pairs = {(ratio["reference"], ratio["contender"]) for ratio in found["ratios"]}
    assert ("dense, hf", "uniform, onnx") in pairs and ("dense, onnx", "uniform, onnx") in pairs
    assert {capacity["memory"] for capacity in found["capacities"]} == {10**6}
    for name in ("uniform", "per-layer"):
        folder = home / "artifacts" / name
        report = json.loads((folder / "report.json").read_text())
        contenders = {row["contender"] for row in report["latency"]["rows"]}
        assert contenders == {f"{name}, hf", f"{name}, onnx"}, "its own report holds its own rows"
        assert json.loads((folder / "bench.json").read_text()) == found, "and every sample"
        check_manifest(folder)
        assert "SHIP" in report["verdict"][0] or "GAIN" in report["verdict"][0]
    assert not list((home / "artifacts").glob(".bench-*")), "nothing is left of the measurement"


def test_anything_may_be_the_reference_and_an_export_be_measured(run, home):
    assert run("export", "uniform", "--format", "onnx", "--precision", "int4", "--block-size", "16", "-q")[0] == 0
    code, out, err = run("bench", "exported/uniform-onnx-int4", "--against", "uniform", "--json", *SHORT)
    assert code == 0, err
    found = json.loads(out)
    assert [contender["name"] for contender in found["contenders"]] == ["uniform", "sliced, onnx"]
    assert found["contenders"][1]["dtype"] == "int4"
    code, out, err = run("bench", "exported/uniform-onnx-int4", *SHORT)
    assert code == 0 and "Speed and memory" in out and "against dense, onnx" in out, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("uniform", "--runtimes", "tpu"), "no runtime 'tpu'.*hf, onnx"),
        (("uniform", "--memory", "much"), "--memory 'much' is not a size.*16GB|--memory 'much' is not a size.*5GB"),
        (("uniform", "--prompt-tokens", "99999"), "positions.*--prompt-tokens"),
        (("dense",), "does not say what it was cut from.*--model"),
        (("nothing",), "nothing is neither a build, a cut, an export nor a model folder"),
        (("uniform", "--device", "cuda", "--memory", "1GB"), "measurement of 'dense' ended.*CUDA|cuda"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, args, message):
    code, out, err = run("bench", *args, "-q")
    assert code in (1, 2) and out == "" and err.count("\n") == 1, err
    assert re.search(message, err), err


def test_artifacts_of_different_models_are_not_measured_together(run, home):
    make_checkpoint(home / "other", Shape(layers=2))
    args = ("build", "--scenario", "sums.yaml", "--model", "other", "--keep", "0.5", *FAST, "-q")
    built = run(*args, "--out", "artifacts/stranger")
    assert built[0] == 0, built[2]
    code, _, err = run("bench", "uniform", "stranger", *SHORT)
    assert code == 2 and "not cut from the same model" in err


@pytest.mark.whole
def test_an_interrupted_measurement_goes_on_unless_its_input_changed(home):
    """Killed after its first session, it takes the others only; another artifact of the same name begins anew."""
    shutil.copytree(home / "artifacts" / "uniform", home / "artifacts" / "again")
    args = (
        "bench",
        "again",
        "--json",
        "--prompt-tokens",
        "16",
        "--new-tokens",
        "12",
        "--repeats",
        "4",
        "--processes",
        "2",
        "--threads",
        "1",
        "-q",
    )

    def interrupted() -> dict:
        process = subprocess.Popen(
            [*PROGRAM, *args], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
        )
        deadline = time.monotonic() + 120
        while not (notes := list((home / "artifacts").glob(".bench-*.json"))):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (path,) = notes
        return json.loads(path.read_text())

    first = interrupted()
    samples = first["sessions"][0]["dense"]["trials"]["batch 1, 16+12 tokens"]
    done = shell(home, *args)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)["contenders"][0]["loads"][0]["metrics"]["prefill_seconds"]["samples"]
    assert taken[: len(samples) - 1] == [trial["prefill_seconds"] for trial in samples[1:]]
    assert len(taken) == 4
    assert not list((home / "artifacts").glob(".bench-*.json"))
    interrupted()
    shutil.rmtree(home / "artifacts" / "again")
    shutil.copytree(home / "artifacts" / "per-layer", home / "artifacts" / "again")
    done = shell(home, *args)
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout)["contenders"][0]["loads"][0]["metrics"]["prefill_seconds"]["samples"]
    assert not set(fresh) & {trial["prefill_seconds"] for trial in samples}
    for path in (home / "artifacts").glob(".bench-*.json"):
        path.unlink()


def test_compare_shows_builds_side_by_side_and_writes_pages(run, home):
    code, out, err = run("compare", "uniform", "per-layer")
    assert code == 0 and err == "" and "uniform" in out and "per-layer" in out and "heads kept" in out
    code, out, _ = run("compare", "uniform", "artifacts/per-layer", "--json", "--out", "side")
    points = json.loads(out)["points"]
    assert code == 0 and [point["layout"] for point in points] == ["uniform", "per-layer"]
    assert points[0]["weight_bytes"] < points[1]["weight_bytes"]
    assert {path.name for path in (home / "side").iterdir()} == {
        "comparison.json",
        "comparison.md",
        "comparison.html",
        "manifest.json",
    }
    assert "One build" in run("compare", "uniform")[1]
    code, out, err = run("compare", "uniform", "--out", "artifacts/uniform", "--overwrite")
    assert code == 2 and "is what the command reads" in err
    code, out, err = run("compare", "uniform", "--out", "side")
    assert code == 2 and "exists and is kept" in err and out == ""
    assert run("compare", "none")[0] == 2


@pytest.mark.whole
def test_a_sweep_builds_measures_and_draws_the_frontier_and_goes_on_where_it_stopped(run, home):
    args = (*BUILD, "--layout", "per-layer", "--sweep", "keep=0.5:1:0.5", "--out", "artifacts/sweep")
    code, out, err = run(*args, "--json")
    assert code == 0, err
    points = json.loads(out)["points"]
    assert [point["name"] for point in points] == ["keep-0.5", "keep-1"]
    assert [point["keep_requested"] for point in points] == [0.5, 1.0]
    assert points[1]["mean_kl"]["value"] == 0 and points[1]["frontier"]
    assert all(point["decode"] and point["decode"]["low"] for point in points)
    sweep = home / "artifacts" / "sweep"
    assert {path.name for path in (sweep / "frontier").iterdir()} == {
        "frontier.json",
        "frontier.md",
        "frontier.html",
        "frontier.svg",
        "manifest.json",
    }
    assert (sweep / "frontier" / "frontier.json").read_text() == out
    shutil.rmtree(sweep / "keep-1")
    before = (sweep / "keep-0.5" / "manifest.json").stat().st_mtime_ns
    assert run(*args, "--no-bench")[0] == 0
    assert (sweep / "keep-0.5" / "manifest.json").stat().st_mtime_ns == before, "finished builds are kept"
    assert (sweep / "keep-1" / "mask.json").is_file()
    other = (*args[:2], "Questions about metals, briefly", *args[3:])
    code, _, err = run(*other, "--no-bench")
    assert code == 2 and "built from something else" in err and "--overwrite" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("heads=1,2", "names no option.*keep, strength"),
        ("keep", "names no option"),
        ("keep=a,b", "not numbers"),
        ("keep=0.5:0.1:0.1", "starts above its stop"),
        ("keep=0.5:inf:0.1", "not numbers"),
        ("keep=0.1:1:0.001", "values.*1 to 40"),
        ("keep=0.5,3", "--keep.*less than or equal to 1"),
        ("layout=round", "--layout"),
        ("keep=0.01", "nearest feasible"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused_in_one_line(run, home, given, message):
    code, out, err = run(*BUILD, "--sweep", given, "--out", "artifacts/refused")
    assert code in (2, 3) and out == "" and re.search(message, err) and "Traceback" not in err, err
    assert not (home / "artifacts" / "refused").exists()


def test_an_option_is_not_both_given_and_swept(run):
    for given, swept in (("--keep", "keep=0.5,1"), ("--keep", "max-params=1M"), ("--max-params", "max_params=1M,1.2M")):
        code, _, err = run(*BUILD, given, "0.5", "--sweep", swept)
        assert code == 2 and "exclude each other" in err


def test_numbers_are_swept_as_they_are_typed(run, home):
    sweep = ("--sweep", "max-params=1.2M,1300000", "--dry-run", "--out", "artifacts/dry")
    code, out, err = run(*BUILD, *sweep)
    assert code == 0 and out.splitlines() == ["artifacts/dry/max_params-1.2M", "artifacts/dry/max_params-1300000"], err
    assert run(*BUILD, "--sweep", "max-params=lots", "--dry-run")[0] == 2


def test_dry_run_of_a_sweep_lists_its_builds(run, home):
    code, out, _ = run(*BUILD, "--sweep", "layout=uniform,per-layer", "--dry-run", "--out", "artifacts/dry")
    assert code == 0 and out.splitlines() == ["artifacts/dry/layout-uniform", "artifacts/dry/layout-per-layer"]
    assert not (home / "artifacts" / "dry").exists()
