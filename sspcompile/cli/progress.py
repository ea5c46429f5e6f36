"""Progress on stderr: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sspcompile import progress


@contextlib.contextmanager
def stages(quiet: bool, *, libraries: bool = True) -> Iterator[progress.Progress]:
    """Yield `report(stage, done, total)`; each stage is one bar with the time left.

    `libraries` says that transformers will take part, and is to be silent.
    """
    if libraries:
        _hush_libraries()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with rich.progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _hush_libraries() -> None:
    """The bars of transformers would run through ours, and its warnings concern its own programmers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
