"""Settings for the whole suite: one hypothesis profile, quiet libraries, one thread per process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# Two test processes on two cores: more threads than cores make torch's barriers spin against each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: nothing that the tests
# start could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine: a red run can be repeated.
settings.register_profile(
    "steady", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


# Minutes each: a worker that begins one of them last would be waited for by the others.
LONG = ("test_readme.py", "test_cli_onnx.py", "test_cli_bench.py", "test_cli.py", "test_eval.py", "test_shortlist.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; order inside a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def embedded():
    """The embedded model in memory."""
    from sspcompile.model.dense import open_dense

    return open_dense(None).load()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, stdout, stderr, with what libraries write to the descriptors."""
    from sspcompile.cli.main import main

    def call(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call
