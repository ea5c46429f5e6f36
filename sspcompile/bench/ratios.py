"""Ratios between two contenders, each with its interval and a verdict that never calls noise a gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sspcompile.bench.metrics import METRICS, Metric
from sspcompile.intervals import Interval, Summary, ratio_interval

Verdict = Literal["better", "worse", "no measurable change", "equal", "too few samples"]
# Two copies of one model differ by about this much from process to process, whatever their intervals say.
NOISE = 0.01


@dataclass(frozen=True)
class Ratio:
    """Reference / contender of one metric, the geometric mean over sessions of the ratio of their medians.

    `load` is None for metrics of a process or a model. `improvement` is the same turned so that above 1 is good
    whichever direction the metric prefers; `interval` and `improvement_interval` are None for counted metrics and for
    fewer than three sessions.
    """

    metric: str
    load: str | None
    reference: str
    contender: str
    ratio: float
    interval: Interval | None
    improvement: float
    improvement_interval: Interval | None
    verdict: Verdict


def compare(
    metric: Metric,
    reference: Summary,
    contender: Summary,
    *,
    sessions: int,
    names: tuple[str, str],
    load: str | None = None,
) -> Ratio | None:
    """The ratio of one metric, or None when a median is 0 and there is none.

    The samples of both lie session after session, equally many in each.
    """
    if contender.median == 0 or reference.median == 0:
        return None
    if metric.exact:
        value, interval = reference.median / contender.median, None
    else:
        value, interval = ratio_interval(_medians(reference.samples, sessions), _medians(contender.samples, sessions))
    improvement = value if metric.lower_is_better else 1 / value
    turned = interval
    if interval and not metric.lower_is_better:
        turned = Interval(1 / interval.high, 1 / interval.low)
    verdict = _verdict(metric, improvement, turned)
    return Ratio(metric.name, load, *names, value, interval, improvement, turned, verdict)


def _medians(samples: Sequence[float], sessions: int) -> list[float]:
    # Between the middle two on a logarithmic scale, so that a time and its rate, one over the other, change alike.
    return [float(np.exp(np.median(np.log(part)))) for part in np.split(np.asarray(samples), sessions)]


def _verdict(metric: Metric, improvement: float, interval: Interval | None) -> Verdict:
    if metric.exact:
        return "equal" if improvement == 1 else "better" if improvement > 1 else "worse"
    if interval is None:
        return "too few samples"
    if interval.covers(1.0) or abs(improvement - 1) < NOISE:
        return "no measurable change"
    return "better" if improvement > 1 else "worse"


def compare_all(
    reference: Mapping[str, Summary],
    contender: Mapping[str, Summary],
    *,
    sessions: int,
    names: tuple[str, str],
    load: str | None = None,
    metrics: Mapping[str, Metric] = METRICS,
) -> tuple[Ratio, ...]:
    """The ratios of every metric that both have, in the order of `metrics`."""
    shared = [metric for name, metric in metrics.items() if name in reference and name in contender]
    ratios = (
        compare(m, reference[m.name], contender[m.name], sessions=sessions, names=names, load=load) for m in shared
    )
    return tuple(ratio for ratio in ratios if ratio is not None)
