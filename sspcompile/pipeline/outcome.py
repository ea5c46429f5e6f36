"""What a build came to: the value between building and reporting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sspcompile.compile.mask import HeadMask
from sspcompile.pipeline.compiling import Compiled, Subject
from sspcompile.pipeline.judging import Decision, Reported
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.recipe import Recipe
from sspcompile.slicing.parity import Parity
from sspcompile.slicing.plan import SlicePlan


@dataclass(frozen=True)
class Outcome:
    """A finished build: what was decided, what was proven, and the figures of everything that was tried."""

    folder: Path
    subject: Subject
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
