"""What a build came to: the value between building and reporting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sspcompile.model.dense import DenseModel
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.proof.parity import Parity
from sspcompile.request.recipe import Recipe
from sspcompile.select.compiling import Compiled
from sspcompile.select.judging import Decision, Reported
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import SlicePlan


@dataclass(frozen=True)
class Outcome:
    """A finished build: what was decided, what was proven, and the figures of everything that was tried."""

    folder: Path
    subject: DenseModel
    options: Recipe
    compiled: Compiled
    decision: Decision
    mask: HeadMask
    plan: SlicePlan
    parity: Parity
    ours: Reported
    baselines: Mapping[str, Reported]
    evidence: Mapping[str, int]
    toolkit: Toolkit
