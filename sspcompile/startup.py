"""How a process of ours starts and ends: most of what a short command costs is importing torch and transformers."""

from __future__ import annotations

import atexit
import gc
import os


def spare_the_collector() -> None:
    """Look for garbage more rarely, and not at the end.

    Importing torch and transformers makes a million objects that live to the end. Python's thresholds look through
    them over and over again, and once more when the interpreter ends: together a third of what an import costs.
    """
    gc.set_threshold(5_000, 20, 100)
    atexit.register(gc.freeze)


# libgomp and libomp let threads that wait spin, which slows whatever else runs on the machine.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def let_threads_sleep() -> None:
    """Let threads of torch and of what it brings along sleep while they wait, here and in processes started from here.

    To be called before torch is imported. Whoever has set how threads wait is not overruled.
    """
    if not any(name in os.environ for name in (*SLEEPING, "GOMP_SPINCOUNT")):
        os.environ.update(SLEEPING)


def send_nothing_home() -> None:
    """Turn off what libraries report about their use, here and in every process that is started from here.

    ONNX Runtime 1.32 on Linux gives the machine a number, keeps events in the home and the temporary folder, and sends
    them; whoever has set its switch is not overruled.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
