"""Settings for the whole suite: one hypothesis profile, quiet libraries, one thread per process."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from toolkits import Toolkits
from warm import Warm

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


@pytest.fixture(scope="session", autouse=True)
def _started_cold() -> Iterator[Iterable[str]]:
    """Proofs begin warm; what a process that imports everything is started with."""
    from sspcompile.proof import whole

    cold = whole.RELOAD
    if not sys.platform.startswith("linux"):
        yield cold
        return
    with tempfile.TemporaryDirectory(prefix="warm-") as folder, pytest.MonkeyPatch.context() as patch:
        warm = Warm(f"{folder}/socket")
        patch.setattr(whole, "RELOAD", warm)
        yield cold
        warm.end()


@pytest.fixture
def cold(_started_cold: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs in processes that import everything, as users have them."""
    monkeypatch.setattr("sspcompile.proof.whole.RELOAD", _started_cold)


@pytest.fixture(scope="session")
def toolkits(tmp_path_factory: pytest.TempPathFactory) -> Toolkits:
    """Toolkits that all test processes share, for builds of tests that are not about learning them."""
    own = tmp_path_factory.getbasetemp()
    return Toolkits((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "toolkits")


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
