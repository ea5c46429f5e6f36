"""Ratios between two contenders, each with its interval and a verdict that never calls noise a gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sspcompile.measure.intervals import Interval, Summary, ratio_interval
from sspcompile.measure.metrics import METRICS, Metric

Verdict = Literal["better", "worse", "no measurable change", "equal", "too few samples"]


@dataclass(frozen=True)
class Ratio:
    """median(reference) / median(contender) of one metric.

    `improvement` is the same turned so that above 1 is good whichever direction the metric prefers; `interval` and
    `improvement_interval` are None for counted metrics and for fewer than five pairs.
    """

    metric: str
    reference: str
    contender: str
    ratio: float
    interval: Interval | None
    improvement: float
    improvement_interval: Interval | None
    verdict: Verdict


def compare(
    metric: Metric, reference: Summary, contender: Summary, *, names: tuple[str, str], seed: int = 0
) -> Ratio | None:
    """The ratio of one metric, or None when the contender's median is 0 and there is none."""
    if contender.median == 0 or reference.median == 0:
        return None
    value = reference.median / contender.median
    interval = None if metric.exact else ratio_interval(reference.samples, contender.samples, seed=seed)
    improvement = value if metric.lower_is_better else 1 / value
    turned = interval
    if interval and not metric.lower_is_better:
        turned = Interval(1 / interval.high, 1 / interval.low)
    verdict = _verdict(metric, improvement, turned)
    return Ratio(metric.name, *names, value, interval, improvement, turned, verdict)


def _verdict(metric: Metric, improvement: float, interval: Interval | None) -> Verdict:
    if metric.exact:
        return "equal" if improvement == 1 else "better" if improvement > 1 else "worse"
    if interval is None:
        return "too few samples"
    if interval.covers(1.0):
        return "no measurable change"
    return "better" if improvement > 1 else "worse"


def compare_all(
    reference: Mapping[str, Summary], contender: Mapping[str, Summary], *, names: tuple[str, str], seed: int = 0
) -> tuple[Ratio, ...]:
    """The ratios of every metric that both have, in the order of METRICS."""
    shared = [metric for name, metric in METRICS.items() if name in reference and name in contender]
    ratios = (compare(m, reference[m.name], contender[m.name], names=names, seed=seed) for m in shared)
    return tuple(ratio for ratio in ratios if ratio is not None)
