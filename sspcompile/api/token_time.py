"""What a token takes of a finished cut whose time was bounded: measured beside the dense model, and as foretold."""

from __future__ import annotations

from pathlib import Path

from sspcompile.intervals import summarize
from sspcompile.model.placement import ANYWHERE, Place, Placement, resolve
from sspcompile.progress import Progress, silent
from sspcompile.report.model import Pair, StepTime, TimedShape, TokenTimeSection
from sspcompile.request.options import Options
from sspcompile.slicing.latency import LatencyTable, Timed, seconds_of
from sspcompile.slicing.plan import SlicePlan

STAGE = "timing the cut"


def token_time(
    options: Options,
    plan: SlicePlan,
    table: LatencyTable | None,
    dense: Path,
    cut: Path,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> TokenTimeSection | None:
    """What a token takes of the finished cut, beside the dense model in turns, and what the table foretold; None where
    no bound on time was asked for. Raises CheckpointError for a model that cannot be loaded.
    """
    if table is None or options.max_latency is None:
        return None
    foretold, place = seconds_of(plan, table), resolve(placement)
    measured: list[StepTime] = []
    if _needed(plan, table, place) <= place.memory:
        from sspcompile.bench.step_times import folder_rounds

        folders = [(dense, False), (cut, plan.custom_code)]
        rounds = folder_rounds(folders, place, table.conditions.serving, progress, STAGE)
        measured = [StepTime(median=one.median, p10=one.p10, p90=one.p90) for one in map(summarize, rounds)]
    conditions, serving = table.conditions, table.conditions.serving
    told = {name: str(getattr(conditions, name)) for name in ("runtime", "device", "processor", "dtype", "threads")}
    return TokenTimeSection(
        requested=options.max_latency / 1e9,
        foretold=Pair(dense=foretold[0], sliced=foretold[1]),
        dense=measured[0] if measured else None,
        sliced=measured[1] if measured else None,
        context=serving.context,
        batch=serving.batch,
        conditions={**told, **conditions.versions},
        worst=table.worst,
        rows=tuple(timed_shape(table, row) for row in table.rows),
    )


def timed_shape(table: LatencyTable, row: Timed) -> TimedShape:
    return TimedShape(
        kind=row.kind,
        layers=row.layers,
        groups=row.groups,
        heads_per_group=row.each,
        width=row.width,
        vocabulary=row.vocabulary,
        seconds=row.seconds,
        foretold=table.foretold(row),
    )


def _needed(plan: SlicePlan, table: LatencyTable, place: Place) -> int:
    """Bytes of both models in the dtype of computing, and of the larger cache: twice as wide at most as it is counted,
    and copied layer by layer.
    """
    cache = plan.memory(table.conditions.serving)[0] - plan.dense.weight_bytes
    return (plan.dense.parameters + plan.sliced.parameters) * place.dtype.itemsize + 3 * cache
