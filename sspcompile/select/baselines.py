"""What else could have been cut: at the same budget, in the same layout, from the same texts, with the same repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sspcompile.criteria.chance import first_layer_kept
from sspcompile.model.divergence import average
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.prepare.toolkits import STANDARD_CRITERIA
from sspcompile.select.budget import merit
from sspcompile.select.judging import Judge, Reported
from sspcompile.select.reading import Reading
from sspcompile.select.scoring import score_heads
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.mask import Layout

SEEDS = 3
Role = Literal["random", "domain-free", "criterion"]


@dataclass(frozen=True)
class Baseline:
    """Another choice of heads, and how far it is from the dense model."""

    role: Role
    name: str
    cost: Reported


def measure_baselines(judge: Judge, reading: Reading, toolkit: Toolkit, layout: Layout) -> tuple[Baseline, ...]:
    """Random heads with the first layer kept (the mean of SEEDS draws), the domain-free mask, the standard scores."""
    random = [first_layer_kept(reading.merit.shape, judge.seed + number) for number in range(SEEDS)]
    free: tuple[Role, str] = ("domain-free", "domain-free mask")
    named = {free: merit(toolkit.importance[reading.criterion].mean(-1), reading.whitelist)}
    for name in STANDARD_CRITERIA:
        if name != reading.criterion:
            scores = score_heads(reading.request, reading.used, toolkit, judge.loaded, name)
            named["criterion", f"criterion {name}"] = merit(scores.values, reading.whitelist)
    kv_heads = judge.loaded.geometry.kv_heads
    choices = [
        (layout, choose(values, kv_heads, reading.keep, layout, groups_only=reading.groups_only))
        for values in (*random, *named.values())
    ]
    reported = [judge.reported(one) for one in judge.candidates(choices, "baselines")]
    averaged = Baseline("random", f"random, first layer kept ({SEEDS}x)", _average(reported[:SEEDS], judge.seed))
    others = zip(named, reported[SEEDS:], strict=True)
    return (averaged, *(Baseline(role, name, cost) for (role, name), cost in others))


def _average(models: Sequence[Reported], seed: int) -> Reported:
    off = [model.off for model in models if model.off is not None]
    return Reported(average([model.own for model in models], seed=seed), average(off, seed=seed) if off else None)
