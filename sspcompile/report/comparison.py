"""Several builds side by side: one point per report, a table of them, and the frontier of quality against size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from sspcompile.intervals import Estimate
from sspcompile.report.blocks import Block, Page, Table, page
from sspcompile.report.first import Picture
from sspcompile.report.format import change, figures, percent, size, with_interval
from sspcompile.report.model import Report, Unit
from sspcompile.report.section import Section
from sspcompile.report.speed import LatencyRow
from sspcompile.report.verdict import headline

SCHEMA_VERSION = 1


class Point(Section):
    """One build. `keep_*` are shares of the heads, `size_*` of all parameters, and `unit` says of which the budget was.
    Sizes in bytes; `mean_kl` and `off_kl` in nats per token; `first_token`, `decode` and `peak_memory` as times
    better than the dense model, None where nothing was measured. `frontier`: no other point is at least as small and
    closer to the dense model.
    """

    name: str
    model: str | None
    scenario: str | None
    keep_requested: float | None
    keep_achieved: float | None
    layout: str | None
    criterion: str | None
    weight_bytes: float | None
    weight_bytes_dense: float | None
    kv_bytes_per_token: float | None
    kv_bytes_per_token_dense: float | None
    mean_kl: Estimate | None
    top1_agreement: Estimate | None
    off_kl: Estimate | None
    load: str | None
    first_token: Estimate | None
    decode: Estimate | None
    peak_memory: Estimate | None
    verdict: str
    frontier: bool = False
    unit: Unit = "heads"
    size_requested: float | None = None
    size_achieved: float | None = None

    @property
    def kept(self) -> float | None:
        """The share that is kept of what the budget counts."""
        return self.keep_achieved if self.unit == "heads" else self.size_achieved


class Points(Section):
    """What `compare` and a sweep write as JSON. `notes` say what keeps the points from being compared."""

    schema_version: Literal[1] = 1
    title: str
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()


def point_of(name: str, report: Report) -> Point:
    """The figures of a report; of its measured loads the first."""
    ours = next((row for row in report.quality if row.role == "ours"), None)
    sizes, budget, latency = report.sizes, report.budget, report.latency
    rows = [row for row in latency.rows if row.reference.startswith("dense")] if latency else []
    load = next((row.load for row in rows if row.load), None)
    return Point(
        name=name,
        model=report.model,
        scenario=report.scenario.name if report.scenario else None,
        keep_requested=budget.keep_requested if budget else None,
        keep_achieved=budget.keep_achieved if budget else None,
        layout=report.layout.chosen if report.layout else None,
        criterion=report.mask.criterion if report.mask else None,
        weight_bytes=sizes.weight_bytes.sliced if sizes else None,
        weight_bytes_dense=sizes.weight_bytes.dense if sizes else None,
        kv_bytes_per_token=sizes.kv_bytes_per_token.sliced if sizes else None,
        kv_bytes_per_token_dense=sizes.kv_bytes_per_token.dense if sizes else None,
        mean_kl=ours.mean_kl if ours else None,
        top1_agreement=ours.top1_agreement if ours else None,
        off_kl=ours.off_kl if ours else None,
        load=load,
        first_token=_improvement(rows, "time to first token", load),
        decode=_improvement(rows, "inter-token latency", load),
        peak_memory=_improvement(rows, "peak resident memory", None),
        verdict=headline(report) or "nothing was measured",
        unit=budget.unit if budget else "heads",
        size_requested=budget.size_requested if budget else None,
        size_achieved=sizes.parameters.sliced / sizes.parameters.dense if sizes else None,
    )


def _improvement(rows: Sequence[LatencyRow], metric: str, load: str | None) -> Estimate | None:
    return next((row.improvement for row in rows if row.metric == metric and row.load == load), None)


def points_of(title: str, reports: Mapping[str, Report]) -> Points:
    """In the order given, the frontier marked."""
    points = [point_of(name, report) for name, report in reports.items()]
    marked = tuple(point.model_copy(update={"frontier": _on_frontier(point, points)}) for point in points)
    return Points(title=title, points=marked, notes=_notes(reports))


def _on_frontier(point: Point, points: Sequence[Point]) -> bool:
    mine = _place(point)
    if mine is None:
        return False
    others = [place for other in points if other is not point and (place := _place(other)) is not None]
    return not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)


def _place(point: Point) -> tuple[float, float] | None:
    if point.weight_bytes is None or point.mean_kl is None:
        return None
    return point.weight_bytes, point.mean_kl.value


def _notes(reports: Mapping[str, Report]) -> tuple[str, ...]:
    notes = []
    if len({report.model for report in reports.values()}) > 1:
        notes.append("The builds are of different models: sizes and speeds compare, divergences do not.")
    if len({report.scenario.text or report.scenario.prompts for report in reports.values() if report.scenario}) > 1:
        notes.append("The builds are for different scenarios: each was judged on prompts of its own.")
    settings = {json.dumps(report.latency.settings, sort_keys=True) for report in reports.values() if report.latency}
    if len(settings) > 1:
        notes.append("The builds were measured under different conditions: their speeds do not compare.")
    if missing := [name for name, report in reports.items() if report.latency is None]:
        notes.append(f"Not measured for speed: {', '.join(missing)}. Run `sspcompile bench`.")
    return tuple(notes)


def render_points(points: Points) -> str:
    """Indented ASCII JSON with a final newline."""
    return json.dumps(points.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def _of(value: float | None, dense: float | None) -> str:
    if value is None or dense is None:
        return "-"
    return f"{size(value)} ({change(dense, value)})"


def _shown(estimate: Estimate | None, show: Callable[[float], str] = figures) -> str:
    return "-" if estimate is None else with_interval(estimate, show)


ROWS: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("heads kept", lambda p: "-" if p.keep_achieved is None else percent(p.keep_achieved)),
    ("parameters kept", lambda p: "-" if p.size_achieved is None else percent(p.size_achieved)),
    ("layout", lambda p: p.layout or "-"),
    ("criterion", lambda p: p.criterion or "-"),
    ("weights", lambda p: _of(p.weight_bytes, p.weight_bytes_dense)),
    ("KV cache per token", lambda p: _of(p.kv_bytes_per_token, p.kv_bytes_per_token_dense)),
    ("mean KL, nats per token", lambda p: _shown(p.mean_kl)),
    ("same next token", lambda p: _shown(p.top1_agreement, percent)),
    ("KL off domain", lambda p: _shown(p.off_kl)),
    ("measured at", lambda p: p.load or "-"),
    ("time to first token, times faster", lambda p: _shown(p.first_token)),
    ("inter-token latency, times faster", lambda p: _shown(p.decode)),
    ("peak memory, times smaller", lambda p: _shown(p.peak_memory)),
    ("smallest for its quality", lambda p: "yes" if p.frontier else "no"),
    ("verdict", lambda p: p.verdict),
)


def comparison_page(points: Points) -> Page:
    """One column per build."""
    table = Table(
        "Quality on held-out prompts against the dense model, 95 % intervals; of speed 99 %",
        ("", *(point.name for point in points.points)),
        tuple((label, *(show(point) for point in points.points)) for label, show in ROWS),
    )
    return page(points.title, (Block("comparison", "Side by side", points.notes, (table,)),))


def frontier_page(points: Points) -> Page:
    """One row per build, smallest first, and the picture."""
    units = sorted({"heads" if point.unit == "heads" else "parameters" for point in points.points})
    # Of what is kept, the share that the sweep was of: the table is wide enough.
    left_out = {"verdict", "criterion", "measured at", *(f"{unit} kept" for unit in ("heads", "parameters"))}
    left_out -= {f"{unit} kept" for unit in units}
    shown = [row for row in ROWS if row[0] not in left_out]
    table = Table(
        "Every build of the sweep; 95 % intervals, of speed 99 %",
        ("build", *(label for label, _ in shown)),
        tuple((point.name, *(show(point) for _, show in shown)) for point in points.points),
    )
    verdicts = Table("Verdicts", ("build", "verdict"), tuple((point.name, point.verdict) for point in points.points))
    label = f"quality against size, cache and speed; the numbers are kept shares of the {' or '.join(units)}"
    picture = Picture("frontier.svg", draw_frontier(points), label)
    return page(points.title, (Block("frontier", "Frontier", points.notes, (table, verdicts), picture),))


def draw_frontier(points: Points) -> str:
    """SVG: mean KL against weights, KV bytes per token, and the two speed-ups; the same points give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[Point], Estimate | None]], ...] = (
        ("weights, MiB", lambda p: _exact(p.weight_bytes, 1 << 20)),
        ("KV cache per token, KiB", lambda p: _exact(p.kv_bytes_per_token, 1024)),
        ("inter-token latency, times faster", lambda p: p.decode),
    )
    with matplotlib.rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(10.5, 3.4), sharey=True)
        for axis, (label, place) in zip(axes, panels, strict=True):
            found = [(x, kl, p) for p in points.points if (x := place(p)) and (kl := p.mean_kl)]
            for x, kl, point in found:
                axis.errorbar(
                    [x.value],
                    [kl.value],
                    xerr=_spread(x),
                    yerr=_spread(kl),
                    fmt="o" if point.frontier else "x",
                    color="#1f66a5",
                    capsize=2,
                    markersize=5,
                )
                if point.kept is not None:
                    axis.annotate(
                        f"{point.kept:.2f}", (x.value, kl.value), textcoords="offset points", xytext=(5, 5), fontsize=8
                    )
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("mean KL, nats per token")
        figure.tight_layout()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _exact(value: float | None, unit: int) -> Estimate | None:
    return None if value is None else Estimate(value=value / unit)


def _spread(estimate: Estimate) -> list[list[float]]:
    """Lengths of the two error bars; zero without an interval."""
    if estimate.low is None or estimate.high is None:
        return [[0.0], [0.0]]
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
