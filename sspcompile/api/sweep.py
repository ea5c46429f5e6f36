"""A sweep: one build per value of an option, measured together, and the frontier of quality against size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sspcompile
from sspcompile.api.bench import BenchRequest, bench
from sspcompile.api.build import build
from sspcompile.api.reads import dense_reads, pool_reads
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.manifest import check_manifest
from sspcompile.checkpoint.replacing import refuse_existing, refuse_read
from sspcompile.errors import InputError, OutputExistsError
from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.progress import Progress, silent
from sspcompile.report.comparison import Points, frontier_page, points_of, render_points
from sspcompile.report.json import read_report
from sspcompile.report.write import write_page
from sspcompile.request.domains import pools_fingerprint
from sspcompile.request.options import BUDGETS, clashing, flag
from sspcompile.request.pools import pools_of
from sspcompile.request.recipe import dump_recipe
from sspcompile.request.request import Request
from sspcompile.workspace import RECIPE, REPORT, Workspace

FRONTIER = "frontier"
NUMBERS = ("size", "keep", "strength", "max_loss", "max_perplexity")
# Taken as they are typed: names, and numbers with a unit.
NAMES = ("criterion", "layout", "repair", "granularity", "max_params", "max_memory", "max_latency")
MOST = 40
TYPED = "Type size=0.7:1:0.1 or keep=0.25,0.5."


@dataclass(frozen=True)
class Axis:
    """An option and the values that it takes, as they are typed."""

    option: str
    values: tuple[str, ...]

    def value(self, text: str) -> float | str:
        return float(text) if self.option in NUMBERS else text


def read_axis(text: str) -> Axis:
    """`size=0.7:1:0.1`, `keep=0.25,0.5` or `criterion=kl,fisher`. Raises InputError."""
    option, equals, given = text.partition("=")
    option = option.replace("-", "_")
    if not equals or option not in (*NUMBERS, *NAMES):
        raise InputError(
            f"--sweep {text!r} names no option to sweep.", hint=f"Type OPTION=VALUES; {', '.join((*NUMBERS, *NAMES))}."
        )
    if option in NUMBERS:
        numbers = _numbers(text, given)
        _demand_few(text, len(numbers))
        return Axis(option, _told(text, numbers))
    names = [name for name in (value.strip() for value in given.split(",")) if name]
    _demand_few(text, len(names))
    return Axis(option, tuple(dict.fromkeys(names)))


def _demand_few(text: str, count: int) -> None:
    if not 1 <= count <= MOST:
        told = "no" if count == 0 else f"more than {MOST}"
        raise InputError(f"--sweep {text!r} has {told} values.", hint=f"Give 1 to {MOST}.")


def _numbers(text: str, given: str) -> list[float]:
    """A list of numbers, or START:STOP:STEP with the stop where a step ends on it; one more than MOST are enough.

    `text`: the whole of what was typed. Raises InputError.
    """
    try:
        found = [float(part) for part in given.split(":" if ":" in given else ",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)) or (":" in given and len(found) != 3):
        raise InputError(f"--sweep {text!r} has values that are not numbers.", hint=TYPED)
    if ":" not in given:
        return found
    start, stop, step = found
    if step <= 0:
        raise InputError(f"--sweep {text!r} has a step that is not above 0.", hint=TYPED)
    if stop < start:
        raise InputError(f"--sweep {text!r} starts above its stop.", hint=TYPED)
    # Compared before it is made whole: a step may be so small that the count is infinite.
    count = MOST + 1 if (stop - start) / step >= MOST else int((stop - start) / step + 1e-9) + 1
    return [start + number * step for number in range(count)]


def _told(text: str, numbers: Sequence[float]) -> tuple[str, ...]:
    """As they stand in names of folders, in six digits, equal numbers once.

    Raises InputError for two that six digits do not tell apart.
    """
    told: dict[str, float] = {}
    for number in numbers:
        other = told.setdefault(f"{number:g}", number)
        if not math.isclose(number, other, rel_tol=1e-12):
            raise InputError(
                f"--sweep {text!r} has values that are equal in six digits ({other!r} and {number!r}).",
                hint="Give values that differ by more.",
            )
    return tuple(told)


def refuse_clash(axis: Axis, given: Mapping[str, Any]) -> None:
    """Raise InputError when an option is given that the sweep sets, or that no value of it can stand beside."""
    for name in (*BUDGETS, *NAMES):
        if given.get(name) is not None and (name == axis.option or clashing((name, axis.option))):
            raise InputError(
                f"{flag(name)} and --sweep {axis.option} exclude each other.", hint="Leave one of them out."
            )


def sweep(
    axis: Axis,
    requests: Sequence[Request],
    dense: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
    measured: bool = True,
    placement: Placement = ANYWHERE,
) -> Points:
    """Build every request under `out`, measure them in one run, and write the frontier to out/frontier.

    What an interrupted sweep finished is kept, if it was made from the same. Raises what `build` and `bench` raise, and
    OutputExistsError for a finished build of another request.
    """
    reads = (*dense_reads(dense), *(place for request in requests for place in pool_reads(request.options)))
    folders = [out / f"{axis.option}-{value}" for value in axis.values]
    for folder in folders:
        refuse_read(folder, reads)
        if overwrite or not (folder / MANIFEST).is_file():  # a finished one is kept as it is
            refuse_existing(folder, overwrite=overwrite)
    refuse_existing(out / FRONTIER, overwrite=True, reads=reads)
    for number, (folder, request) in enumerate(zip(folders, requests, strict=True)):
        progress("sweep", number, len(requests))
        if not _finished(folder, request, dense, overwrite):
            build(request, dense, folder, workspace, progress, overwrite=overwrite, placement=placement)
    progress("sweep", len(requests), len(requests))
    if measured:
        given = [str(folder) for folder in folders]
        bench(given, BenchRequest.of(quick=True, threads=placement.threads), workspace, progress)
    points = points_of(f"Sweep of {axis.option}", {folder.name: read_report(folder / REPORT) for folder in folders})
    with staged(out / FRONTIER, overwrite=True, reads=reads) as folder:
        write_page(frontier_page(points), render_points(points), folder, FRONTIER)
        write_manifest(folder, {"builds": [folder.name for folder in folders]})
    return points


def _finished(folder: Path, request: Request, dense: DenseModel, overwrite: bool) -> bool:
    if overwrite or not (folder / MANIFEST).is_file():
        return False
    origin = check_manifest(folder).origin
    made = (origin.get("source"), origin.get("pools"), origin.get("sspcompile"))
    now = (dense.fingerprint, pools_fingerprint(pools_of(request.options).candidates), sspcompile.__version__)
    if (folder / RECIPE).read_text("utf-8") != dump_recipe(request.recipe()) or made != now:
        raise OutputExistsError(f"{folder} was built from something else.", hint="Give --overwrite, or another --out.")
    return True
