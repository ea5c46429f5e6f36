"""From a finished build, and later its benchmark, to the one value that all renderers read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import sspcompile
from sspcompile.api.outcome import Outcome
from sspcompile.checkpoint.gguf import PLAIN
from sspcompile.checkpoint.source import not_carried
from sspcompile.export.card import licence_of
from sspcompile.model.divergence import Divergence, compare_divergences
from sspcompile.repair.repair import MIN_PROMPTS, is_linear
from sspcompile.report.build import protected_row, quality_row
from sspcompile.report.heads import mask_section
from sspcompile.report.model import (
    BudgetSection,
    LayoutSection,
    Pair,
    ParitySection,
    QualityRow,
    RepairSection,
    Report,
    Role,
    RuntimeRow,
    ScenarioSection,
    SizesSection,
)
from sspcompile.request.domains import pools_fingerprint
from sspcompile.request.options import AUTO
from sspcompile.request.pools import pools_of
from sspcompile.request.prompts import told
from sspcompile.request.splits import Holding
from sspcompile.slicing.latency import seconds_of
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.sizes import share_of
from sspcompile.workspace import RECIPE

# The rest of the origin is told elsewhere in the report.
ORIGIN_SHOWN = ("sspcompile", "source", "pools", "seed", "device", "dtype", "threads")


def report_of(outcome: Outcome) -> Report:
    """Everything known about a build before it is benchmarked."""
    selection, scenario = outcome.selection, outcome.request.scenario
    reading, mask = selection.reading, selection.mask
    mixture = reading.mixture
    return Report(
        title=f"{scenario.name}: {_kept(outcome)}",
        model=outcome.dense.name,
        scenario=ScenarioSection(
            name=scenario.name,
            source=scenario.source,
            text=scenario.text,
            prompts=tuple(map(told, scenario.prompts)),
            mixture={name: float(w) for name, w in zip(mixture.domains, mixture.weights, strict=True)},
            unknown=mixture.unknown,
            fits_no_domain=mixture.is_unknown,
            breadth=mixture.breadth,
            judged=(reading.splits.own_judge, len(reading.splits.judge)),
        ),
        mask=mask_section(mask),
        budget=_budget(outcome),
        layout=_layout(outcome),
        parity=ParitySection(
            max_difference=outcome.parity.max_difference,
            logit_scale=outcome.parity.logit_scale,
            tolerance=outcome.parity.bound,
            dtype=outcome.parity.dtype,
            texts_equal=None if outcome.parity.layerwise else outcome.parity.same_text,
            after_repair=selection.repair is not None,
        ),
        repair=_repair(outcome),
        quality=tuple(_quality(outcome)),
        protected=tuple(protected_row(one.domain, one.max_loss, one.guard, one.judge) for one in selection.spared),
        sizes=_sizes(outcome),
        rounding=outcome.rounding,
        token_time=outcome.token_time,
        runtimes=tuple(RuntimeRow(name=v.runtime, loads=v.loads, note=v.reason) for v in outcome.plan.runtimes),
        notes=tuple(_notes(outcome)),
        # Sorted: a toolkit just made and the same one read back list them in different orders.
        versions={str(k): str(v) for k, v in sorted(outcome.toolkit.meta.get("versions", {}).items())},
        origin={name: str(value) for name, value in origin_of(outcome).items() if name in ORIGIN_SHOWN},
        command=_command(),
    )


def _kept(outcome: Outcome) -> str:
    """What is left, in the unit of everything that the build could have removed."""
    if _counts_parameters(outcome):
        return f"{outcome.plan.size:.1%} of the parameters kept"
    return f"{outcome.selection.mask.keep_achieved:.1%} of the attention heads kept"


def _counts_parameters(outcome: Outcome) -> bool:
    """Whether more than heads could go."""
    return _channels_may_go(outcome) or outcome.request.options.whole is not None


def _channels_may_go(outcome: Outcome) -> bool:
    reading = outcome.selection.reading
    return bool(reading.budget.bounds) and reading.worth().channels is not None


def _budget(outcome: Outcome) -> BudgetSection:
    selection, options = outcome.selection, outcome.request.options
    floor, budget, mask = selection.floor, selection.reading.budget, selection.mask
    bounded = floor.tried if floor is not None and options.max_perplexity is not None else ()
    memory = latency = None
    if budget.serving is not None and options.max_memory is not None:
        memory = outcome.plan.memory(budget.serving)[1]
    if outcome.table is not None:
        latency = seconds_of(outcome.plan, outcome.table)[1]
    return BudgetSection(
        keep_requested=mask.keep_requested,
        keep_achieved=mask.keep_achieved,
        strength=options.strength,
        max_loss=options.max_loss,
        max_perplexity=options.max_perplexity,
        measured=tuple((one.kept, one.loss.value) for one in floor.tried) if floor is not None else (),
        at_most=tuple(one.loss.most for one in floor.tried) if floor is not None else (),
        perplexities=tuple((one.perplexity.value, one.perplexity.most) for one in bounded if one.perplexity),
        unit=budget.unit,
        size_requested=mask.size_requested,
        size_achieved=outcome.plan.size,
        params_requested=mask.params_requested,
        memory_requested=options.max_memory,
        memory_achieved=memory,
        latency_requested=None if options.max_latency is None else options.max_latency / 1e9,
        latency_achieved=latency,
        context=budget.serving.context if budget.serving is not None else None,
        batch=budget.serving.batch if budget.serving is not None else None,
    )


def _row(
    name: str, figures: Divergence, role: Role, reference: Divergence, off: Divergence | None = None
) -> QualityRow:
    above = None if figures is reference else compare_divergences(figures, reference)
    return quality_row(name, figures, role=role, above_ours=above, off=off)


def _quality(outcome: Outcome) -> Iterator[QualityRow]:
    """Ours first; the baselines have the same budget, layout and repair."""
    selection = outcome.selection
    ours = selection.cost.own
    yield _row("this build", ours, "ours", ours, selection.cost.off)
    if selection.repair is not None:
        plain = selection.without_repair
        yield _row("this build, without repair", plain.own, "other", ours, plain.off)
    for other in selection.baselines:
        yield _row(other.name, other.cost.own, other.role, ours, other.cost.off)


def _layout(outcome: Outcome) -> LayoutSection:
    decision = outcome.selection.decision
    reference = decision.candidates[decision.chosen.layout].final
    geometry = outcome.plan.geometry

    def kept(choice: Choice) -> str:
        if _counts_parameters(outcome):
            return f"{share_of(geometry, choice):.1%} of the parameters kept"
        return f"{choice.ratio:.1%} kept"

    figures = tuple(
        _row(f"{layout} ({kept(candidate.choice)})", candidate.final, layout, reference)
        for layout, candidate in decision.candidates.items()
    )
    cost = decision.uniform_cost
    if outcome.request.options.whole == "layers":
        reason = "layers that stay whole have one shape"
    elif outcome.request.options.whole == "attention":
        reason = "layers with and without attention differ"
    elif cost is None and _no_uniform(outcome):
        reason = "no uniform cut that a class can hold keeps more than the per-layer cuts that lost too much"
    elif cost is None:
        reason = "the only layout asked for, or the only one that a class can hold"
    elif decision.spares:
        reason = "the other layout loses more of a protected domain than --protect allows"
    elif decision.chosen.layout == "uniform":
        reason = "the uniform layout costs nothing measurable here, and loads with stock classes"
    else:
        reason = f"the uniform layout diverges by {cost.value:.3g} nats per token more on the guard texts"
    return LayoutSection(
        requested=outcome.request.options.layout, chosen=decision.chosen.layout, figures=figures, reason=reason
    )


def _no_uniform(outcome: Outcome) -> bool:
    """Whether `auto` left the uniform layout out of a search for the smallest mask within a loss (`_may_hold`)."""
    selection, options = outcome.selection, outcome.request.options
    return selection.floor is not None and options.layout == AUTO and selection.mask.layout == "per-layer"


def _repair(outcome: Outcome) -> RepairSection:
    selection = outcome.selection
    chosen = selection.decision.chosen
    if outcome.request.options.repair == "none":
        return RepairSection(used=False, reason="switched off with --repair none")
    if chosen.with_repair is None:
        return RepairSection(used=False, reason=_unrepaired(outcome))
    return RepairSection(
        used=chosen.keeps_repair,
        reason=None if chosen.keeps_repair else "it made the guard texts worse",
        kl_before=selection.without_repair.own.mean_kl.value,
        kl_after=selection.with_repair.own.mean_kl.value if selection.with_repair is not None else None,
    )


def _unrepaired(outcome: Outcome) -> str:
    """Why nothing was fitted."""
    if outcome.selection.decision.chosen.choice.units.everything:
        return "nothing was removed"
    if outcome.request.options.repair != "flap-bias" and not is_linear(outcome.plan.geometry):
        return "a norm stands between o_proj and the residual stream, where least squares does not apply"
    return f"fewer than {MIN_PROMPTS} texts to fit it on"


def _sizes(outcome: Outcome) -> SizesSection:
    plan = outcome.plan
    pairs = {
        key: Pair(dense=getattr(plan.dense, key), sliced=getattr(plan.sliced, key))
        for key in ("parameters", "weight_bytes", "kv_bytes_per_token")
    }
    channels = plan.channel_share if _channels_may_go(outcome) else None
    return SizesSection(prunable_share=plan.prunable_share, channel_share=channels, **pairs)


def _notes(outcome: Outcome) -> Iterator[str]:
    e = outcome.selection.reading.splits.counts()
    yield (
        f"Chosen and repaired on {e['fit']} texts ({e['own_fit']} of the scenario's own); layout and repair decided on "
        f"{e['guard']} others ({e['own_guard']} own); judged on {e['judge']} that decided nothing ({e['own_judge']} "
        "own). The rest are domain pool prompts in the proportion of the mixture."
    )
    if e["off"]:
        yield f"Off domain are {e['off']} held-out pool prompts of the domains that the scenario is not about."
    if outcome.selection.spared:
        yield (
            f"{e['protected_fit']} of the texts that chose and repaired are pool prompts of what is protected "
            f"({', '.join(one.domain for one in outcome.selection.spared)}); {e['protected_guard']} more decided, and "
            f"{e['protected_judge']} more judged."
        )
    yield _importance(outcome)
    if without := outcome.request.options.without:
        yield f"Switched off with --without: {', '.join(without)}."
    if outcome.request.scenario.domains is not None:
        yield "The recipe says what the scenario is about; no text was read to find out."
    elif outcome.toolkit.meta.get("recognition", {}).get("unknown_found") is None:
        yield "No text outside the domains taught recognition, so no share of a scenario is called unknown."
    if rounded := sorted(set(outcome.dense.origin.get("gguf", {}).get("types", ())) - set(PLAIN)):
        yield (
            f"The dense model is that of a GGUF file, rounded to {', '.join(rounded)}: nothing here says how far it is "
            "from the model that was rounded."
        )


def _importance(outcome: Outcome) -> str:
    scores = outcome.selection.reading.scores
    if scores.source == "domains":
        return "Heads were scored by the domains' cached importance, mixed in the proportion of the scenario."
    if (whole := outcome.request.options.whole) is not None:
        own = "of the scenario's own prompts" if scores.source == "prompts" else "of the texts that chose"
        what = "Layers were ranked by their" if whole == "layers" else "Attention was ranked layer by layer by its"
        return f"{what} influence on {scores.prompts} {own}."
    scored = "Heads" if not _channels_may_go(outcome) else "Heads and channels of the MLPs"
    if scores.source == "prompts":
        beside = "and prompts of what is protected" if outcome.selection.spared else "alone"
        return f"{scored} were scored on {scores.prompts} of the scenario's own prompts {beside}."
    if scores.source == "texts":
        return f"{scored} were scored on {scores.prompts} of the texts that chose."
    return (
        f"Heads were scored by the domains' cached importance and on {scores.prompts} of the scenario's own prompts, "
        f"which had a weight of {scores.prompt_weight:.0%}."
    )


def _command() -> str:
    """The command that repeats the build from the recipe in the artifact, typed there: equal builds, equal reports."""
    return shlex.join(["sspcompile", "build", "--scenario", RECIPE, "--out", "NEW_FOLDER"])


def origin_of(outcome: Outcome) -> dict[str, Any]:
    """What the artifact was made from; the same origin gives the same bytes."""
    return {
        "sspcompile": sspcompile.__version__,
        **outcome.dense.origin,
        "licence": licence_of(outcome.dense.checkpoint.path),
        "left_out": not_carried(outcome.dense.checkpoint.path),
        "pools": pools_fingerprint(pools_of(outcome.request.options).candidates),
        "seed": outcome.request.options.seed,
        **outcome.place.facts(),
        "versions": outcome.toolkit.meta.get("versions", {}),
        "holding": int(Holding.SPACED),
        "evidence": outcome.selection.reading.splits.counts(),
        "min_prompts_for_repair": MIN_PROMPTS,
    }
