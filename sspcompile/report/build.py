"""From measured values to report sections."""

from __future__ import annotations

from sspcompile.measure.compare import Ratio
from sspcompile.measure.intervals import Interval
from sspcompile.measure.latency import BenchResult, ContenderResult
from sspcompile.measure.metrics import METRICS
from sspcompile.measure.quality import Difference, Divergence
from sspcompile.report.model import Estimate, LatencyRow, LatencySection, QualityRow, Role


def estimate(value: float, interval: Interval | None) -> Estimate:
    """A value with its interval, or without one."""
    return Estimate(value=value, low=interval.low if interval else None, high=interval.high if interval else None)


def quality_row(
    name: str,
    divergence: Divergence,
    *,
    role: Role = "other",
    above_ours: Difference | None = None,
    exact_match: Estimate | None = None,
) -> QualityRow:
    """`above_ours` is `compare_divergences(this, ours)`; `exact_match` a share of right answers."""
    return QualityRow(
        name=name,
        role=role,
        mean_kl=estimate(divergence.mean_kl, divergence.mean_kl_interval),
        top1_agreement=estimate(divergence.top1_agreement, divergence.top1_agreement_interval),
        kl_above_ours=estimate(above_ours.mean, above_ours.interval) if above_ours else None,
        exact_match=exact_match,
    )


def latency_section(result: BenchResult) -> LatencySection:
    """One row per ratio of the benchmark."""
    contenders = {contender.name: contender for contender in result.contenders}
    rows = tuple(_row(r, contenders[r.reference], contenders[r.contender]) for r in result.ratios)
    settings = result.settings
    return LatencySection(
        settings={
            "prompt tokens": settings.prompt_tokens,
            "new tokens": settings.new_tokens,
            "batch": settings.batch,
            "trials": settings.repeats,
            "warm-up trials, discarded": settings.warmup,
            "threads": settings.threads,
            "device": settings.device,
            "dtype": ", ".join(sorted({contender.dtype for contender in result.contenders})),
        },
        rows=rows,
    )


def _row(ratio: Ratio, reference: ContenderResult, contender: ContenderResult) -> LatencyRow:
    metric = METRICS[ratio.metric]
    top, bottom = reference.metrics[ratio.metric], contender.metrics[ratio.metric]
    return LatencyRow(
        metric=metric.label,
        unit=metric.unit,
        reference=reference.name,
        contender=contender.name,
        reference_median=top.median,
        reference_p10=top.p10,
        reference_p90=top.p90,
        contender_median=bottom.median,
        contender_p10=bottom.p10,
        contender_p90=bottom.p90,
        samples=len(bottom.samples),
        improvement=estimate(ratio.improvement, ratio.improvement_interval),
        verdict=ratio.verdict,
        definition=metric.definition,
    )
