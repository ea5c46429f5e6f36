"""How long work says how far it is: one type for whole commands, one for a single stage."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

Steps = Callable[[int, int], None]
"""Called with (steps done, steps in all) of one stage."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody is told."""


def no_steps(_done: int, _total: int) -> None:
    """Nobody is told of a stage."""


def within(progress: Progress, whole: str) -> Progress:
    """The stages of a part, told as `WHOLE: STAGE`."""
    return lambda stage, done, total: progress(f"{whole}: {stage}", done, total)


def stage_of(progress: Progress, stage: str) -> Steps:
    """The steps of `stage`, told to `progress`."""
    return lambda done, total: progress(stage, done, total)


def adding(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Called with steps just done; tells `progress` how many of `total` are done in all."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return more
