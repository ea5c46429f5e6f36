"""Progress on stderr: one line on a terminal, about the running stage; elsewhere a line a minute, as a log wants it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import click
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sspcompile import progress

UPDATES_PER_SECOND = 4
MEMORY_SECONDS = 1.0
# A log is read afterwards: what is over within a minute needs no line in it.
LINE_SECONDS = 60.0
MOST_STEPS = 10_000  # steps beyond it are bytes, or as good as: their share says more


@contextlib.contextmanager
def stages(quiet: bool, *, libraries: bool = True) -> Iterator[progress.Progress]:
    """Yield `report(stage, done, total)`; the line has the steps done of all, the time gone and left, and the memory.

    `libraries` says that transformers will take part, and is to be silent.
    """
    if libraries:
        _hush_libraries()
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield progress.silent if quiet else _Lines()
        return
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
    bars = rich.progress.Progress(*columns, console=console, refresh_per_second=UPDATES_PER_SECOND, transient=True)
    with bars:

        def report(stage: str, done: int, total: int) -> None:
            for name, task in tasks.items():  # first, so that there are never two lines
                if name != stage:
                    bars.update(task, visible=False)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total, visible=True)

        yield report


class _Lines:
    """Reports to what is no terminal: a file, a pipe, the log of a job."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._stage, self._since, self._from = "", self._begun, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._since, self._from = stage, now, done
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        minutes = f"{(now - self._begun) / 60:.0f} min gone"
        if done > self._from:  # what an earlier run did took none of this one's time
            left = (now - self._since) / (done - self._from) * (total - done)
            minutes += f", about {left / 60:.0f} min left of this stage"
        click.echo(f"{stage}: {_steps(done, total)}, {minutes}", err=True)


def _steps(done: float, total: float) -> str:
    """Steps done of all, or their share."""
    return f"{done / total:.0%}" if total > MOST_STEPS else f"{done:.0f}/{total:.0f}"


class _Steps(ProgressColumn):
    """How far a stage is."""

    def render(self, task: Task) -> Text:
        return Text(_steps(task.completed, task.total or 0))


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
