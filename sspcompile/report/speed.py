"""Sections of a report about time and capacity."""

from __future__ import annotations

from sspcompile.intervals import Estimate
from sspcompile.report.section import Section


class LatencyRow(Section):
    """One metric of two contenders: medians with p10 and p90, and how many times better the second one is.

    `load` says how many sequences of how many tokens, and is None for metrics of a process or of the model itself.
    """

    metric: str
    load: str | None = None
    unit: str
    reference: str
    contender: str
    reference_median: float
    reference_p10: float
    reference_p90: float
    contender_median: float
    contender_p10: float
    contender_p90: float
    samples: int
    improvement: Estimate | None = None
    verdict: str = ""
    definition: str = ""


class RooflineRow(Section):
    """What one decode step must read and compute, the time that reading takes at least, and the time it took."""

    contender: str
    load: str
    bytes_per_step: float
    flops_per_token: float | None = None
    floor_seconds: float
    measured_seconds: float


class PredictionRow(Section):
    """How many times faster a decode step is by the bytes alone, and as measured.

    `realised`: the share of the predicted saving of time that arrived. `reference_share`: of the reference's time, what
    reading its bytes takes.
    """

    load: str
    reference: str
    contender: str
    predicted: float
    measured: Estimate
    realised: float | None = None
    reference_share: float


class CapacityRow(Section):
    """The longest context of one sequence, and the largest batch, by weights and cache alone."""

    contender: str
    context: int
    batch: int


class LatencySection(Section):
    """`settings` say under what conditions the rows hold. `bandwidth` in bytes per second; `memory` in bytes and
    `tokens` are what the capacities are for.
    """

    settings: dict[str, int | str]
    rows: tuple[LatencyRow, ...]
    rooflines: tuple[RooflineRow, ...] = ()
    predictions: tuple[PredictionRow, ...] = ()
    capacities: tuple[CapacityRow, ...] = ()
    bandwidth: float | None = None
    memory: float | None = None
    tokens: int | None = None
