"""How a process of ours starts and ends: most of what a short command costs is importing torch and transformers."""

from __future__ import annotations

import atexit
import gc


def spare_the_collector() -> None:
    """Look for garbage more rarely, and not at the end.

    Importing torch and transformers makes a million objects that live to the end. Python's thresholds look through
    them over and over again, and once more when the interpreter ends: together a third of what an import costs.
    """
    gc.set_threshold(5_000, 20, 100)
    atexit.register(gc.freeze)
