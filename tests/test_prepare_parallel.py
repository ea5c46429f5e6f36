"""Two processes under torchrun find what one alone finds, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint

from sspcompile.criteria.measuring import measure
from sspcompile.model import parallel
from sspcompile.model.capture import features
from sspcompile.model.journal import Journal, keeping
from sspcompile.model.loading import load
from sspcompile.model.text import batches_of, continued

PROMPTS = [f"{'What is ' * (1 + n % 5)}{n} plus {n}?" for n in range(23)]


def find(model: Path) -> dict[str, np.ndarray]:
    """Everything that is shared between processes: features, continuations, a criterion."""
    loaded = load(model, fingerprint="")
    texts = continued(loaded, PROMPTS, 4, 64, 200)
    batches = batches_of(loaded, texts, 200)
    return {
        "features": features(loaded, PROMPTS, 32),
        "texts": np.array([len(text.ids) for text in texts] + [token for text in texts for token in text.ids]),
        # Scored by prompt, by prompt with random draws, and by set of prompts.
        **{
            name: measure(loaded, name, texts, labels=np.arange(len(texts)) % 3, seed=1).values
            for name in ("kl", "fisher", "wanda")
        },
        "batches": np.array([len(batches)]),
    }


def torchrun(folder: Path, processes: int, *command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*program, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parallel") / "dense", Shape(kv_heads=2, layers=2))


def test_two_processes_measure_what_one_measures(model, tmp_path):
    torchrun(tmp_path, 2, Path(__file__), model, tmp_path)
    alone = find(model)
    assert alone["batches"][0] > 2
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert all(np.array_equal(found[name], value) for name, value in alone.items())
            # Neither of them did all the work.
            assert 0 < found["own"][0] < alone["batches"][0]


def test_every_process_has_its_own_gpu_before_it_meets_the_others(monkeypatch):
    done = []
    for name, value in {parallel.RANK: "3", parallel.SIZE: "4", parallel.LOCAL_RANK: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: done.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("left"))
    with parallel.joined() as world:
        assert (world.rank, world.size, world.device) == (3, 4, "cuda:1") and done == [1, "nccl"]
    assert done[-1] == "left" and parallel.current().size == 1


@pytest.mark.whole
def test_two_processes_go_on_with_what_one_had_measured(model, tmp_path):
    with keeping(Journal(tmp_path / "kept", every=0)):
        alone = find(model)
    rows = sorted((tmp_path / "kept").glob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in rows[::2]}
    assert len(rows) > 10
    for path in rows[1::2]:
        path.unlink()
    torchrun(tmp_path, 2, Path(__file__), model, tmp_path)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert all(np.array_equal(found[name], value) for name, value in alone.items())
    assert sorted((tmp_path / "kept").glob("*.safetensors")) == rows, "each process keeps what it measured"
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nothing is measured twice"


@pytest.mark.whole
def test_prepare_under_torchrun_writes_one_toolkit_equal_to_that_of_one_process(model, tmp_path):
    options = ("prepare", "--model", model, "--criterion", "subspace", "--max-tokens", 16, "--json")
    options = (*options, "--continuation-tokens", 1)
    written = {}
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        done = torchrun(home, processes, "-m", "sspcompile.cli.main", *options)
        folder = home / json.loads(done.stdout)["folder"]  # printed once
        folder = next(folder.parent.glob(folder.name + "*"))
        written[processes] = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    assert "toolkit.safetensors" in written[1] and written[1] == written[2]


def test_alone_nothing_is_shared_and_nothing_is_imported():
    world = parallel.current()
    rows = np.ones(3)
    assert world.first and world.share([1, 2, 3]) == [1, 2, 3] and world.total(rows) is rows
    assert world.union({1: "a"}) == {1: "a"}
    with parallel.joined() as joined:
        assert joined is world


@pytest.mark.whole
def test_a_build_under_torchrun_is_the_build_of_one_process(model, tmp_path):
    prompts = tmp_path / "desk.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ("build", "--model", model, "--scenario", prompts, "--criterion", "subspace", "--max-tokens", 16)
    options = (*options, "--continuation-tokens", 1, "--keep", 0.5, "--layout", "uniform", "--json")
    written = {}
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        done = torchrun(home, processes, "-m", "sspcompile.cli.main", *options)
        assert json.loads(done.stdout)["model"] == str(model)  # printed once
        folder = home / "artifacts" / "desk"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written[processes] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    assert "manifest.json" in written[1] and written[1] == written[2]


if __name__ == "__main__":
    with parallel.joined() as world, keeping(Journal(Path(sys.argv[2]) / "kept", every=0)):
        values = find(Path(sys.argv[1]))
        count = len(world.share(range(int(values["batches"][0]))))
        np.savez(Path(sys.argv[2]) / f"{world.rank}.npz", own=np.array([count]), **values)
