"""Progress on stderr: one line on a terminal, about the running stage; nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sspcompile import progress

UPDATES_PER_SECOND = 4
MEMORY_SECONDS = 1.0
MOST_STEPS = 10_000  # steps beyond it are bytes, or as good as: their share says more


@contextlib.contextmanager
def stages(quiet: bool, *, libraries: bool = True) -> Iterator[progress.Progress]:
    """Yield `report(stage, done, total)`; the line has the steps done of all, the time gone and left, and the memory.

    `libraries` says that transformers will take part, and is to be silent.
    """
    if libraries:
        _hush_libraries()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        _Steps(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("left,"),
        _Memory(),
    )
    tasks: dict[str, TaskID] = {}
    bars = rich.progress.Progress(
        *columns,
        console=console,
        refresh_per_second=UPDATES_PER_SECOND,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bars:

        def report(stage: str, done: int, total: int) -> None:
            for name, task in tasks.items():  # first, so that there are never two lines
                if name != stage:
                    bars.update(task, visible=False)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total, visible=True)

        yield report


class _Steps(ProgressColumn):
    """Steps done of all, or their share."""

    def render(self, task: Task) -> Text:
        total = task.total or 0
        if total > MOST_STEPS:
            return Text(f"{task.completed / total:.0%}")
        return Text(f"{task.completed:.0f}/{total:.0f}")


class _Memory(ProgressColumn):
    """What this process has in memory now."""

    max_refresh = MEMORY_SECONDS

    def render(self, _task: Task) -> Text:
        import psutil

        from sspcompile.report.format import size

        return Text(f"{size(psutil.Process().memory_info().rss)} in memory")


def _hush_libraries() -> None:
    """The bars of transformers would run through ours, and its warnings concern its own programmers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
