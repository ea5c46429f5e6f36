"""From measured values to report sections."""

from __future__ import annotations

from collections.abc import Collection

from sspcompile.bench.latency import BenchResult, ContenderResult
from sspcompile.bench.metrics import METRICS
from sspcompile.bench.ratios import Ratio
from sspcompile.intervals import Estimate, Summary
from sspcompile.model.divergence import Divergence
from sspcompile.report.model import ProtectedRow, QualityRow, Role
from sspcompile.report.speed import CapacityRow, LatencyRow, LatencySection, PredictionRow, RooflineRow


def quality_row(
    name: str,
    divergence: Divergence,
    *,
    role: Role = "other",
    above_ours: Estimate | None = None,
    exact_match: Estimate | None = None,
    off: Divergence | None = None,
) -> QualityRow:
    """`above_ours` is `compare_divergences(this, ours)`; `exact_match` a share of right answers; `off` the divergence
    on domains that the scenario is not about.
    """
    return QualityRow(
        name=name,
        role=role,
        mean_kl=divergence.mean_kl,
        top1_agreement=divergence.top1_agreement,
        kl_above_ours=above_ours,
        exact_match=exact_match,
        off_kl=off.mean_kl if off else None,
        off_agreement=off.top1_agreement if off else None,
        answer_perplexity=divergence.perplexity,
        reply_perplexity=divergence.reply_perplexity,
    )


def protected_row(domain: str, max_loss: float, guard: Divergence, judge: Divergence) -> ProtectedRow:
    """`guard`: on texts that decided, `judge`: on those that decided nothing."""
    return ProtectedRow(
        domain=domain,
        max_loss=max_loss,
        guard_loss=1 - guard.top1_agreement.value,
        loss=judge.changed,
        texts=len(judge.prompts),
    )


def latency_section(result: BenchResult, only: Collection[str] | None = None) -> LatencySection:
    """One row per ratio of the benchmark, and what the bytes say; `only` of these contenders and their references."""
    settings, contenders = result.settings, {contender.name: contender for contender in result.contenders}
    ratios = [r for r in result.ratios if only is None or r.contender in only]
    pairs = {(r.reference, r.contender) for r in ratios}
    shown = {name for pair in pairs for name in pair} or set(contenders)
    return LatencySection(
        settings={
            "loads": "; ".join(load.label for load in settings.loads),
            "processes of each": settings.sessions,
            "trials in each": settings.trials,
            "warm-up trials, discarded": settings.warmup,
            "threads": settings.threads,
            "device": settings.device,
            "dtype": ", ".join(sorted({contender.dtype for contender in result.contenders})),
        },
        rows=tuple(_row(r, contenders[r.reference], contenders[r.contender]) for r in ratios),
        rooflines=tuple(
            RooflineRow(
                contender=contender.name,
                load=under.load.label,
                bytes_per_step=line.bytes_per_step,
                flops_per_token=line.flops_per_token,
                floor_seconds=line.floor_seconds,
                measured_seconds=line.measured_seconds,
            )
            for contender in result.contenders
            if contender.name in shown
            for under in contender.loads
            for line in (under.roofline,)
        ),
        predictions=tuple(
            PredictionRow(
                load=p.load,
                reference=p.reference,
                contender=p.contender,
                predicted=p.predicted,
                measured=Estimate.of(p.measured, p.interval),
                realised=p.realised,
                reference_share=p.reference_share,
            )
            for p in result.predictions
            if (p.reference, p.contender) in pairs
        ),
        capacities=tuple(
            CapacityRow(contender=c.contender, context=c.context, batch=c.batch)
            for c in result.capacities
            if c.contender in shown
        ),
        bandwidth=result.bandwidth.median,
        memory=settings.memory,
        tokens=settings.loads[-1].positions,
    )


def _row(ratio: Ratio, reference: ContenderResult, contender: ContenderResult) -> LatencyRow:
    metric = METRICS[ratio.metric]
    top, bottom = _summary(reference, ratio), _summary(contender, ratio)
    return LatencyRow(
        metric=metric.label,
        load=ratio.load,
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
        improvement=Estimate.of(ratio.improvement, ratio.improvement_interval),
        verdict=ratio.verdict,
        definition=metric.definition,
    )


def _summary(contender: ContenderResult, ratio: Ratio) -> Summary:
    if ratio.load is None:
        return contender.metrics[ratio.metric]
    return next(under for under in contender.loads if under.load.label == ratio.load).metrics[ratio.metric]
