"""The parent's side of a worker: starting it under equal conditions, asking, and explaining its death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sspcompile.errors import EXIT_BAD_INPUT, CheckpointError, RunError, SspError
from sspcompile.startup import SLEEPING

QUIET_THREADS = {**SLEEPING, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
STOP_SECONDS = 10
REASON_CHARACTERS = 300


# What is started, with the name of a runtime behind it.
WORKER: Sequence[str] = (sys.executable, "-P", "-m", "sspcompile.bench.worker")


class Worker:
    """A live worker process. A context manager: leaving it ends the process whatever happened."""

    def __init__(self, name: str, runtime: str, *, threads: int) -> None:
        self.name = name
        self._runtime, self._threads = runtime, threads
        self._forks, self._spent = True, False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        count = str(self._threads)
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = (
            os.environ
            | QUIET_THREADS
            | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONPATH": os.pathsep.join(paths)}
        )
        return subprocess.Popen(
            [*WORKER, self._runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # its forks end with it, and an interrupt of the terminal reaches the parent alone
        )

    def wait_ready(self) -> None:
        """Wait until its imports are done. Raises RunError if it dies."""
        self._forks = bool(self._read()["forks"])

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A fresh process behind this worker, for the time being. Raises RunError if it dies."""
        if self._spent:  # its process was that of the session before
            self._process.communicate()
            self._process = self._started()
            self.wait_ready()
        self.ask("session")
        yield
        self.ask("end")
        self._spent = not self._forks

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises RunError with the last line of its log if it dies, and CheckpointError if it refused its model.
        """
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> SspError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        if code == EXIT_BAD_INPUT:
            return CheckpointError(reason)
        ended = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with code {code}"
        return RunError(f"The measurement of {self.name!r} {ended}: {reason[:REASON_CHARACTERS]}")

    def _kill(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing stdin ends an idle worker; one that is computing is not waited for.
        if kind is not None:
            self._kill()
        try:
            self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.communicate()
        self._log.close()
