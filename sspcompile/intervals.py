"""Bootstrap intervals and summaries of samples. Every random draw takes a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

LEVEL = 0.95
# A report asks a dozen ratios at once whether something changed: at 95 % every other one would call noise a change.
RATIO_LEVEL = 0.99
RESAMPLES = 4000
BLOCK_ELEMENTS = 4_000_000
# Below this the bootstrap has too few distinct resamples to say anything.
FEWEST_SAMPLES = 5
# Two pairs give an interval as wide as the sky.
FEWEST_PAIRS = 3
# A 99th percentile of fewer samples is an extrapolation.
FEWEST_FOR_P99 = 100


@dataclass(frozen=True)
class Interval:
    """A two-sided interval: of LEVEL, of a ratio of RATIO_LEVEL."""

    low: float
    high: float

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval (95 %, ratios of speed and memory 99 %), where enough samples gave one."""

    value: float
    low: float | None = None
    high: float | None = None

    # Reports hold estimates as they are; JSON cannot hold what is not finite.
    __pydantic_config__: ClassVar[dict[str, object]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "revalidate_instances": "always",
    }

    @classmethod
    def of(cls, value: float, interval: Interval | None) -> Estimate:
        return cls(value) if interval is None else cls(value, interval.low, interval.high)

    @property
    def most(self) -> float:
        """The upper end of the interval; the value itself where too few samples gave none."""
        return self.value if self.high is None else self.high

    @property
    def rest(self) -> Estimate:
        """1 minus it, of a share."""
        low, high = (None if end is None else max(0.0, 1 - end) for end in (self.high, self.low))
        return Estimate(1 - self.value, low, high)

    @property
    def measurable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Summary:
    """Samples of one metric in the order in which they were taken, with median and percentiles in their unit.

    `p99` is None below 100 samples.
    """

    samples: tuple[float, ...]
    median: float
    p10: float
    p90: float
    p99: float | None


def summarize(samples: Sequence[float]) -> Summary:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples")
    p10, median, p90, p99 = (float(x) for x in np.percentile(samples, [10, 50, 90, 99]))
    return Summary(tuple(map(float, samples)), median, p10, p90, p99 if len(samples) >= FEWEST_FOR_P99 else None)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, *, seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """95 % interval of a statistic over `count` units, or None below FEWEST_SAMPLES.

    `statistic` maps indices [resamples, count] to values [resamples]. The percentiles are expanded for small samples
    (Hesterberg 2014, "What teachers should know about the bootstrap", section 4.3.3): the plain percentile interval
    of 5 samples covers the truth in about 80 % of cases instead of 95 %.
    """
    if count < FEWEST_SAMPLES:
        return None
    from scipy import stats  # half a second that reading a report does not need

    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_ELEMENTS // count)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    values = np.concatenate([statistic(rng.integers(0, count, (size, count))) for size in sizes])
    tail = stats.norm.cdf(-np.sqrt(count / (count - 1)) * stats.t.ppf((1 + LEVEL) / 2, count - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def mean_interval(values: Sequence[float] | np.ndarray, *, seed: int) -> Interval | None:
    """Interval of the mean."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda index: array[index].mean(axis=1), len(array), seed=seed)


def mean_estimate(values: Sequence[float] | np.ndarray, *, seed: int) -> Estimate:
    """The mean, with its interval."""
    return Estimate.of(float(np.mean(values)), mean_interval(values, seed=seed))


def share_estimate(shares: Sequence[float] | np.ndarray, positions: int, *, seed: int) -> Estimate:
    """The mean of shares in [0, 1] of so many positions in all, with its interval: that of the mean, and no narrower
    than Wilson's for as many independent positions (Probable inference, 1927). Where nothing differs all resamples are
    alike, and ten positions would seem to say as much as a thousand.
    """
    found = mean_estimate(shares, seed=seed)
    if found.low is None or found.high is None:
        return found
    from scipy import stats

    trials = stats.binomtest(round(found.value * positions), positions)
    ends = trials.proportion_ci(LEVEL, method="wilson")
    return Estimate(found.value, min(found.low, float(ends.low)), max(found.high, float(ends.high)))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, Interval | None]:
    """Geometric mean of numerator / denominator over pairs, with Student's 99 % interval of its logarithm.

    Pairs are fresh processes: what differs from process to process (where memory came to lie) is part of the interval,
    which resampling trials of one process would leave out. None below FEWEST_PAIRS.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} values against {len(denominator)}: pairs are needed")
    logs = np.log(np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64))
    mean = float(logs.mean())
    if len(logs) < FEWEST_PAIRS:
        return float(np.exp(mean)), None
    from scipy import stats

    reach = float(stats.t.ppf((1 + RATIO_LEVEL) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return float(np.exp(mean)), Interval(float(np.exp(mean - reach)), float(np.exp(mean + reach)))
