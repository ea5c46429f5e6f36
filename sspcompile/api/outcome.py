"""What a build came to: the value between building and reporting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import Place
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.proof.parity import Parity
from sspcompile.report.model import RoundingSection, TokenTimeSection
from sspcompile.request.request import Request
from sspcompile.select.selection import Selection
from sspcompile.slicing.latency import LatencyTable
from sspcompile.slicing.plan import SlicePlan


@dataclass(frozen=True)
class Outcome:
    """A finished build: what was asked, what was decided, what was written, what was proven of it, where
    it was computed, how it compares with rounding, where that was asked, and by which `table` a bound on time counted
    and what came of it."""

    folder: Path
    dense: DenseModel
    request: Request
    toolkit: Toolkit
    selection: Selection
    plan: SlicePlan
    parity: Parity
    place: Place
    rounding: RoundingSection | None = None
    table: LatencyTable | None = None
    token_time: TokenTimeSection | None = None
