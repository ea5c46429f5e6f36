"""The bound on the time of a decoded token: what was asked, what the table foretold, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from sspcompile.report.format import count, percent, seconds
from sspcompile.report.model import StepTime, TokenTimeSection

MISSED = "MISSED"


def token_time_verdict(section: TokenTimeSection) -> Iterator[str]:
    """Whether the cut takes what was asked for, and how well the table foretold it."""
    asked, told = seconds(section.requested), f"the table foretold {seconds(section.foretold.sliced)}"
    if section.dense is None or section.sliced is None:
        yield (
            f"A decoded token takes {seconds(section.foretold.sliced)} of {asked} by the table alone: the dense model "
            "and the cut did not fit into memory together, so the cut was not timed."
        )
        return
    found = f"A decoded token takes {_told(section.sliced)} as measured"
    if not section.missed:
        yield f"{found}, of {asked} that were allowed; {told}."
    else:
        chance = ", by no more than rounds differ" if section.sliced.p10 <= section.requested else ""
        yield f"{MISSED}: {found[0].lower()}{found[1:]}, above the {asked} that were asked for{chance}; {told}."
    # How fast the machine was on both occasions leaves the ratio as it is.
    share, by_table = section.sliced.median / section.dense.median, section.foretold.sliced / section.foretold.dense
    yield (
        f"The dense model takes {_told(section.dense)}, foretold {seconds(section.foretold.dense)}; the cut takes "
        f"{percent(share)} of its time, foretold {percent(by_table)}. No row of the table is further from its fit than "
        f"{percent(section.worst)}."
    )


def _told(time: StepTime) -> str:
    return f"{seconds(time.median)} ({seconds(time.p10)} to {seconds(time.p90)})"


def token_time_table(section: TokenTimeSection) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Caption, headers and rows: what was timed, and how far the straight lines are from it."""
    several = len({row.kind for row in section.rows}) > 1
    conditions = ", ".join(f"{name} {value}" for name, value in section.conditions.items())
    rows = [
        (
            f"{row.layers} layers{f' of kind {row.kind + 1}' if several else ''}"
            f"{', all tokens in the head' if row.vocabulary else ''}",
            count(row.groups),
            count(row.heads_per_group),
            count(row.width),
            seconds(row.seconds),
            seconds(row.foretold),
            f"{100 * (row.foretold / row.seconds - 1):+.1f} %",
        )
        for row in section.rows
    ]
    caption = f"Layers of other shapes with random weights, as timed and as fitted: {_cache(section)}; {conditions}"
    return caption, ("model", "groups", "heads of each", "MLP width", "a token", "fitted", "error"), tuple(rows)


def _cache(section: TokenTimeSection) -> str:
    several = "one sequence" if section.batch == 1 else f"{count(section.batch)} sequences"
    return f"{several} of {count(section.context)} tokens in the cache"
