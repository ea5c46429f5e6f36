"""The three figures that a report opens with, for every renderer: what is left, how fast it is, what was lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sspcompile.intervals import LEVEL, RATIO_LEVEL, Estimate
from sspcompile.report.format import clean, figures, percent, size
from sspcompile.report.model import Pair, QualityRow, Report, SizesSection
from sspcompile.report.speed import LatencyRow, LatencySection
from sspcompile.report.verdict import HEADLINE_METRICS, ours_of

NOT_YET = "not measured yet: sspcompile bench"
# Where a scale may end: the first step that holds every value and interval of its figure.
LOSS_STEPS = (0.1, 0.25, 0.5, 1.0)
SPEED_STEPS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SPEED_FINDINGS = {"better": "faster", "worse": "LOSS: slower"}
NAME_CHARACTERS = 14


@dataclass(frozen=True)
class Bar:
    """One value of a panel. `at`, `low` and `high` are places on the panel's scale from 0 to 1; `at` is None where
    nothing was measured, `low` and `high` where there is no interval. The rest says the same in words.
    """

    label: str
    value: str
    detail: str
    finding: str = ""
    at: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """One figure. `about` says in two lines what its values are. Its bars start at `origin`; `ends` and `middle` name
    those places of the scale. `absent` stands in where there are no bars.
    """

    key: str
    title: str
    about: tuple[str, str] = ("", "")
    aside: str = ""
    bars: tuple[Bar, ...] = ()
    ends: tuple[str, str] = ("", "")
    middle: str = ""
    origin: float = 0.0
    absent: str = ""


def panels_of(report: Report) -> tuple[Panel, Panel, Panel]:
    """What is left, speed, what was lost."""
    return _left(report.sizes), _speed(report.latency), _lost(ours_of(report))


def spoken(panel: Panel) -> str:
    """A panel in one sentence, for those who do not see it."""
    if not panel.bars:
        return f"{panel.title}: {panel.absent}."
    about = ", ".join(filter(None, (*panel.about, panel.aside)))
    bars = "; ".join(f"{bar.label} {in_words(bar)}" for bar in panel.bars)
    return f"{panel.title} ({about}): {bars}."


def in_words(bar: Bar) -> str:
    """`12.9 % (7 % to 20.3 %)`, and what follows from it."""
    told = f"{bar.value} ({bar.detail})" if bar.detail else bar.value
    return f"{told}, {bar.finding}" if bar.finding else told


def _left(sizes: SizesSection | None) -> Panel:
    title = "What is left"
    if sizes is None:
        return Panel("left", title, absent="not known")
    bars = (_share("weights", sizes.weight_bytes), _share("KV cache per token", sizes.kv_bytes_per_token))
    return Panel("left", title, ("of the dense model", "exact counts"), bars=bars, ends=("0", "dense"))


def _share(label: str, pair: Pair) -> Bar:
    detail = f"{size(pair.sliced)} of {size(pair.dense)}"
    if not pair.dense:
        return Bar(label, "-", detail)
    share = pair.sliced / pair.dense
    return Bar(label, percent(share), detail, at=_bounded(share))


def _speed(latency: LatencySection | None) -> Panel:
    """Of one pair under one load: the first whose reference is the dense model, else the first."""
    title = "Speed"
    if latency is None:
        return Panel("speed", title, absent=NOT_YET)
    rows = [row for row in latency.rows if row.metric in HEADLINE_METRICS and row.improvement is not None]
    if not rows:
        return Panel("speed", title, absent="nothing to compare was measured")
    first = _case(next((row for row in rows if row.reference.startswith("dense")), rows[0]))
    cases = len({_case(row) for row in rows})
    shown = [(row, row.improvement) for row in rows if _case(row) == first and row.improvement is not None]
    largest = _step(SPEED_STEPS, max(_reach(improvement) for _, improvement in shown))
    reference, contender, load = first
    return Panel(
        "speed",
        title,
        (f"{_short(contender)} as a multiple of {_short(reference)}", f"{percent(RATIO_LEVEL)} intervals"),
        aside=clean(load or "") + (f" (1 of {cases})" if cases > 1 else ""),
        bars=tuple(_ratio(row, improvement, largest) for row, improvement in shown),
        ends=(f"{largest:g} times slower", f"{largest:g} times faster"),
        middle="as fast",
        origin=0.5,
    )


def _case(row: LatencyRow) -> tuple[str, str, str | None]:
    return row.reference, row.contender, row.load


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"


def _reach(improvement: Estimate) -> float:
    """How far from 1 a ratio and its interval go, in whichever direction."""
    values = (improvement.value, improvement.low, improvement.high)
    return max(max(value, 1 / value) for value in values if value is not None and value > 0)


def _ratio(row: LatencyRow, improvement: Estimate, largest: float) -> Bar:
    def place(ratio: float) -> float:
        return _bounded(0.5 + math.log(ratio) / math.log(largest) / 2) if ratio > 0 else 0.0

    finding = SPEED_FINDINGS.get(row.verdict, clean(row.verdict))
    return _bar(row.metric, improvement, place, figures, finding)


def _lost(ours: QualityRow | None) -> Panel:
    title = "What was lost"
    if ours is None:
        return Panel("lost", title, absent="not measured")
    shares = {"on the scenario": _changed(ours.top1_agreement)}
    if ours.off_agreement is not None:
        shares["off the scenario"] = _changed(ours.off_agreement)
    top = _step(LOSS_STEPS, max(share.value if share.high is None else share.high for share in shares.values()))
    bars = [_bar(label, share, lambda value: _bounded(value / top), percent) for label, share in shares.items()]
    if ours.off_agreement is None:
        bars.append(Bar("off the scenario", "not measured", ""))
    return Panel(
        "lost",
        title,
        ("share of next tokens that change", f"held-out texts, {percent(LEVEL)} intervals"),
        bars=tuple(bars),
        ends=("0 %", percent(top)),
    )


def _changed(agreement: Estimate) -> Estimate:
    """The share that does not agree."""
    low, high = agreement.low, agreement.high
    return Estimate(
        1 - agreement.value, None if high is None else max(0.0, 1 - high), None if low is None else max(0.0, 1 - low)
    )


def _bar(
    label: str, estimate: Estimate, place: Callable[[float], float], show: Callable[[float], str], finding: str = ""
) -> Bar:
    value, at, low, high = show(estimate.value), place(estimate.value), estimate.low, estimate.high
    if low is None or high is None:
        return Bar(label, value, "no interval: too few samples", finding, at)
    detail = "none was seen" if estimate.value == low == high == 0 else f"{show(low)} to {show(high)}"
    return Bar(label, value, detail, finding, at, place(low), place(high))


def _step(steps: tuple[float, ...], value: float) -> float:
    return next((step for step in steps if step >= value), steps[-1])


def _bounded(place: float) -> float:
    return min(1.0, max(0.0, place))
