"""What surrounds a run: the network, the clock, and mistakes of our own that no error class stands for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint

from sspcompile.checkpoint import check_manifest

PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")
BUILD = (
    "build",
    "--scenario",
    "Questions about the chemistry of metals",
    "--max-tokens",
    "24",
    "--continuation-tokens",
    "4",
    "--criterion",
    "fisher",
    "--model",
    "model",
    "--keep",
    "0.5",
    "--layout",
    "per-layer",
    "--out",
    "artifacts/offline",
    "-q",
)

# Python imports `sitecustomize` before anything else, in every process that a command starts.
NO_NETWORK = """
import os, sys

def watch(event, args):
    remote = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event == "socket.connect" and not isinstance(args[1], (str, bytes))
    )
    if remote:
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(event, args, file=log)
        raise OSError("there is no network here")

sys.addaudithook(watch)
"""
BACKWARDS = """
import time

real, calls = time.time, [0]

def time_backwards():
    calls[0] += 1
    return real() - 3600 * calls[0]

time.time = time_backwards
"""


def surrounded(home: Path, code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, with `code` run first in each of its processes."""
    hooks = home / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(code)
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [*PROGRAM, *map(str, args)],
        cwd=home,
        text=True,
        capture_output=True,
        check=False,
        env=inherited | {"PYTHONPATH": str(hooks), "NETWORK_LOG": str(home / "network.log")} | environment,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(family="llama", layers=2, hidden=64, kv_heads=4, group_size=2, head_dim=16))
    return home


def asked(home: Path) -> str:
    """What was asked of the network since the last look."""
    log = home / "network.log"
    found = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return found


@pytest.fixture(scope="module")
def built(home) -> Path:
    """The home, with an artifact that was built without a network."""
    done = surrounded(home, NO_NETWORK, *BUILD)
    assert done.returncode == 0, done.stderr
    return home


def test_a_model_in_a_folder_asks_nothing_of_the_network(built, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    assert asked(built) == ""
    for args in (
        ("export", "artifacts/offline", "--format", "onnx", "--out", "exported/offline"),
        ("run", "exported/offline", "--prompt", "What is iron?", "--max-new-tokens", "2"),
    ):
        done = surrounded(built, NO_NETWORK, *args, HOME=str(private), TMPDIR=str(private), XDG_CACHE_HOME=str(private))
        assert done.returncode == 0, done.stderr
        assert asked(built) == "", args
    # ONNX Runtime's telemetry does not go through Python; it keeps what it is going to send in files.
    left = {path.name for path in private.rglob("*") if path.is_file()}
    assert left <= {"modeling_sspcompile.py", "__init__.py"}, left


def test_offline_means_that_nothing_is_asked_for_a_hub_name_either(home):
    name = ("plan", "--model", "somebody/some-model")
    done = surrounded(home, NO_NETWORK, *name, HF_HUB_OFFLINE="1", HF_HOME=str(home / "cache"))
    assert done.returncode == 2 and "offline" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert asked(home) == ""
    # Without the switch the hub is asked: the log would have shown it.
    done = surrounded(home, NO_NETWORK, *name, HF_HOME=str(home / "cache"))
    assert done.returncode == 2 and "unreachable" in done.stderr, done.stderr
    assert "huggingface.co" in asked(home)


@pytest.mark.whole
def test_code_of_others_runs_with_the_flag_only(built, tmp_path):
    """A checkpoint that brings a class of its own, and an artifact whose modeling file was changed."""
    theirs, proof = tmp_path / "theirs", tmp_path / "ran"
    shutil.copytree(built / "model", theirs)
    config = json.loads((theirs / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_theirs.Theirs"}
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "modeling_theirs.py").write_text(
        f"from transformers import LlamaForCausalLM as Theirs\nopen({str(proof)!r}, 'w').close()\n"
    )
    write = ("run", theirs, "--prompt", "What is iron?", "--max-new-tokens", "2", "-q")
    surrounded(built, "", *BUILD[:-1], "--model", theirs, "--out", tmp_path / "cut", "-q")
    surrounded(built, "", *write)
    assert not proof.exists()
    trusted = surrounded(built, "", *write, "--trust-remote-code", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert trusted.returncode == 0 and proof.exists(), trusted.stderr
    tampered = tmp_path / "tampered"
    shutil.copytree(built / "artifacts" / "offline" / "model", tampered)
    with (tampered / "modeling_sspcompile.py").open("a") as code:
        code.write(f"open({str(tmp_path / 'tampered-ran')!r}, 'w').close()\n")
    done = surrounded(built, "", "run", tampered, "--prompt", "What is iron?", "-q")
    assert done.returncode == 2 and "it is not run" in done.stderr
    assert not (tmp_path / "tampered-ran").exists()


@pytest.mark.slow
def test_a_clock_that_goes_backwards_is_no_matter(built):
    long_after = 4102444800  # the year 2100
    (built / "artifacts" / ".partial-offline-abcdefgh").mkdir()
    for path in [*(built / "artifacts").rglob("*"), built / "artifacts"]:
        os.utime(path, (long_after, long_after))
    short = ("--quick", "--processes", "2", "--repeats", "2", "--new-tokens", "3", "--prompt-tokens", "8", "-q")
    for args in ((*BUILD, "--overwrite"), ("bench", "artifacts/offline", "--model", "model", *short)):
        done = surrounded(built, BACKWARDS, *args)
        assert done.returncode == 0, done.stderr
    assert not (built / "artifacts" / ".partial-offline-abcdefgh").exists()
    check_manifest(built / "artifacts" / "offline")


@pytest.mark.parametrize("debug", [False, True])
def test_nobody_sees_a_traceback_without_asking_for_it(debug, home):
    """Neither of an input that is wrong nor of a defect; both with `--debug`."""
    flag = ("--debug",) if debug else ()
    wrong = surrounded(home, "", *flag, "inspect", "nowhere")
    assert wrong.returncode == 2 and ("Traceback" in wrong.stderr) == debug
    assert wrong.stderr.splitlines()[-1].startswith("Error: nowhere is neither a build")
    defect = "import sspcompile.workspace as w\nw.Workspace.artifact = None\n"
    broken = surrounded(home, defect, *flag, "inspect", "nowhere")
    assert broken.returncode == 1 and ("Traceback" in broken.stderr) == debug, broken.stderr
    if not debug:
        assert broken.stderr.startswith("Error: Unexpected ") and broken.stderr.count("\n") == 1
        assert "sspcompile --debug" in broken.stderr


NO_MEMORY = {
    "python": "raise MemoryError",
    "system": "raise OSError(12, 'Cannot allocate memory')",
    "processor": "import torch\n    torch.empty(1 << 50)",
    "device": "import torch\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    "driver": "import torch\n    raise torch.AcceleratorError('CUDA error: out of memory')",
    "apple": "raise RuntimeError('MPS backend out of memory (MPS allocated: 18.13 GB)')",
    "multiplying": "raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')",
}


@pytest.mark.parametrize("where", NO_MEMORY)
def test_memory_that_ran_out_is_no_defect_and_says_what_takes_less(where, home):
    fails = f"def artifact(*_):\n    {NO_MEMORY[where]}\n"
    code = f"import sspcompile.workspace as w\n{fails}w.Workspace.artifact = artifact\n"
    done = surrounded(home, code, "inspect", "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("Error: Memory ran out. "), done.stderr
    assert "--memory" in done.stderr and done.stderr.count("\n") == 1
