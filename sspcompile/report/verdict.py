"""The report in plain sentences, derived from the numbers alone. A loss is always a sentence of its own."""

from __future__ import annotations

from collections.abc import Iterator

from sspcompile.intervals import Estimate
from sspcompile.report.floors import bounds_told, broken_bounds, times_told
from sspcompile.report.format import change, figures, layers_named, percent, with_interval
from sspcompile.report.model import BudgetSection, MaskSection, QualityRow, Report, RoundingSection, SizesSection
from sspcompile.report.rounding import AS_GOOD, BETTER, asked, rounding_verdict
from sspcompile.report.speed import LatencyRow, LatencySection, PredictionRow
from sspcompile.report.token_time import MISSED, token_time_verdict

# Below this share of agreement more than every tenth token differs: nobody would call that the same model.
FEW_AGREE = 0.9
# Many of those tokens are a toss-up; reference answers that the cut finds about as likely say that it still answers.
ANSWERS_HOLD = 1.05
# An interval that reaches further could as well be that of answers which got far less likely.
ANSWERS_AT_MOST = 1.1
# Whatever a bound allows, replies that may be more perplexing than this are not about as likely as before.
REPLIES_AT_MOST = 1.25
# When this share of a decode step is no reading of memory, it is what keeps the saving from arriving.
MUCH_ELSE = 0.25
HEADLINE_METRICS = ("time to first token", "inter-token latency")
SPOKEN_METRICS = (*HEADLINE_METRICS, "load", "peak resident memory", "peak device memory")
ALARMS = (
    *("LOSS", "FAILED", "FURTHER", "DO NOT SHIP", "TEST BEFORE YOU SHIP", "FOR THIS SCENARIO ONLY"),
    *("LOSES MORE THAN", "NO MEASURABLE GAIN", AS_GOOD, BETTER, MISSED),
)


def verdict(report: Report) -> tuple[str, ...]:
    """The conclusion, then sentences in the order of what matters: is it exact, what is lost, what is gained, what is
    not known.
    """
    sentences = (
        *filter(None, (headline(report),)),
        *_parity(report),
        *_quality(report),
        *_protected(report),
        *_baselines(report),
        *_repair(report),
        *_sizes(report),
        *(_rounding(report.rounding, report.budget) if report.rounding else ()),
        *(token_time_verdict(report.token_time) if report.token_time else ()),
        *_latency(report),
        *_scenario(report),
    )
    return sentences or ("Nothing was measured.",)


def alarming(sentence: str) -> bool:
    """Whether a sentence of a verdict says something that must not be overlooked."""
    return any(alarm in sentence for alarm in ALARMS)


def headline(report: Report) -> str | None:
    """One conclusion from the numbers; None without a quality measurement of a build."""
    ours, parity = ours_of(report), report.parity
    if ours is None:
        return None
    if parity is not None and not parity.holds:
        return "DO NOT SHIP: the files do not compute what the masked model computes."
    narrow, broken = _narrow(ours), broken_bounds(ours, report.budget)
    flags = " and ".join(one.flag for one in broken)
    loss = f"loses quality off domain, {narrow}" if narrow is not None else ""
    if harmed := [one.domain for one in report.protected if one.broken]:
        loss = f"loses more of {' and '.join(harmed)} than --protect allows"
    if ours.top1_agreement.value < FEW_AGREE:
        over = f"loses more than {flags} allows" if broken else ""
        return _few_agree(ours, report.budget, " and ".join(filter(None, (over, loss))))
    if broken:
        also, told = f"; it also {loss}" if loss else "", "; ".join(one.told for one in broken)
        return f"LOSES MORE THAN {flags} ALLOWS: {told}{also}. Try a smaller {flags}."
    faster = _faster(report.latency) if report.latency is not None else ""
    if report.latency is not None and not faster:
        return f"NO MEASURABLE GAIN IN SPEED{_smaller(report)}{loss and f'; {loss}'}."
    if loss:
        return f"SHIP FOR THIS SCENARIO ONLY: {loss}."
    if report.latency is None:
        return "QUALITY HOLDS, speed is not known: run `sspcompile bench`."
    return f"SHIP: faster where it was measured ({faster}){_smaller(report)}."


def _few_agree(ours: QualityRow, budget: BudgetSection | None, loss: str) -> str:
    """`loss`: what else is lost, in words, or nothing."""
    differs = percent(1 - ours.top1_agreement.value)
    told = f"{differs} of the next tokens on the scenario's own domain differ from the dense model's"
    likely = _likely(ours, budget)
    if likely is None:
        return f"DO NOT SHIP: {told}{loss and f'; it {loss}'}."
    return (
        f"TEST BEFORE YOU SHIP: {told}, and {likely}{loss and f'; it {loss}'}. Ask both models what your users ask, as "
        "`sspcompile eval` does."
    )


def _likely(ours: QualityRow, budget: BudgetSection | None) -> str | None:
    """That replies are as likely as they have to be; None where that is not known, or not so."""
    answers = _holding_answers(ours)
    if answers is not None:
        return f"the reference answers are about as likely as before (perplexity {with_interval(answers)} times)"
    replies, most = ours.reply_perplexity, budget.max_perplexity if budget is not None else None
    if replies is None or most is None or replies.high is None or replies.value > most:
        return None
    if replies.high > min(max(most, ANSWERS_AT_MOST), REPLIES_AT_MOST):
        return None
    found = times_told(replies)
    return f"replies have {found} times the perplexity, of {most:g} that --max-perplexity allows"


def _holding_answers(ours: QualityRow) -> Estimate | None:
    """The perplexity of reference answers, where they hold. Nothing is concluded from texts that are too few for an
    interval, or whose interval reaches above ANSWERS_AT_MOST.
    """
    found = ours.answer_perplexity
    if found is None or found.high is None or found.high > ANSWERS_AT_MOST:
        return None
    return found if found.value <= ANSWERS_HOLD else None


def _narrow(ours: QualityRow) -> str | None:
    """What is lost off domain beyond the own domain; None where the intervals meet or nothing was measured there, and
    where no more next tokens differ there, which is what is told.
    """
    off = ours.off_kl
    if off is None or ours.off_agreement is None or off.low is None or ours.mean_kl.high is None:
        return None
    if off.low <= ours.mean_kl.high or ours.off_agreement.value >= ours.top1_agreement.value:
        return None
    there, own = percent(1 - ours.off_agreement.value), percent(1 - ours.top1_agreement.value)
    return f"where {there} of the next tokens differ, against {own} on its own" if there != own else None


def _faster(latency: LatencySection) -> str:
    """Which metrics got better, and where not under all loads, under how many; the findings say by how much."""
    gains = []
    for metric in HEADLINE_METRICS:
        verdicts = [row.verdict for row in latency.rows if row.metric == metric and row.improvement is not None]
        better = verdicts.count("better")
        if better:
            gains.append(metric if better == len(verdicts) else f"{metric} in {better} of {len(verdicts)} measurements")
    return ", ".join(gains)


def _smaller(report: Report) -> str:
    if report.sizes is None:
        return ""
    weights, cache = report.sizes.weight_bytes, report.sizes.kv_bytes_per_token
    return f"; weights {change(weights.dense, weights.sliced)}, KV cache {change(cache.dense, cache.sliced)}"


def _parity(report: Report) -> Iterator[str]:
    parity = report.parity
    if parity is None:
        return
    figure = f"largest logit difference {figures(parity.relative)} of the scale in {parity.dtype}"
    if parity.holds:
        yield f"The files equal the masked model: {figure}."
    elif parity.relative > parity.tolerance:
        yield f"FAILED: the files do not equal the masked model: {figure}."
    else:
        yield f"FAILED: the files write other text than the masked model, with a {figure}."


def ours_of(report: Report) -> QualityRow | None:
    """The row of the build itself."""
    return next((row for row in report.quality if row.role == "ours"), None)


def _quality(report: Report) -> Iterator[str]:
    ours = ours_of(report)
    if ours is None:
        yield "Quality was not measured, so what the cut costs is not known."
        return
    agreement = ours.top1_agreement
    if agreement.value == 1 and ours.mean_kl.value == 0:
        yield "On held-out prompts of the scenario no difference from the dense model was found."
        yield from _judged(report)
        return
    found = "On held-out prompts of the scenario every next token is the dense model's"
    if agreement.value < 1:
        found = (
            "LOSS: on held-out prompts of the scenario the next token differs from the dense model's in "
            f"{percent(1 - agreement.value)} of the positions{_turned(agreement)}"
        )
    yield f"{found}, with a mean KL of {with_interval(ours.mean_kl)} nats."
    yield from _judged(report)
    yield from bounds_told(ours, report.budget)
    if agreement.value < FEW_AGREE and _likely(ours, report.budget) is None:
        yield f"That is a different model in use, not a smaller copy: try {_milder(report.budget)} before shipping it."
    bounded = report.budget is not None and report.budget.max_perplexity is not None
    # Of prompts that all have an answer these are the replies, which were told before.
    if ours.answer_perplexity is not None and not (bounded and ours.answer_perplexity == ours.reply_perplexity):
        times = with_interval(ours.answer_perplexity)
        yield f"The perplexity of the reference answers is {times} times the dense model's."
    yield from _exact_match(report, ours)


def _judged(report: Report) -> Iterator[str]:
    """Whose prompts those were, where the scenario had too few of its own."""
    own, every = (report.scenario.judged if report.scenario is not None else None) or (0, 0)
    if own < every:
        whose = {0: "none of them is", 1: "one of them is"}.get(own, f"{own} of them are")
        yield f"Those are {every} prompts, and {whose} the scenario's own; others are of its domains, from the pools."


def _rounding(section: RoundingSection, budget: BudgetSection | None) -> Iterator[str]:
    """What rounding does to the cut: other figures and the budget are those of the model as it is stored."""
    changed, allowed = asked(section).changed, budget.max_loss if budget is not None else None
    replies, most = asked(section).reply_perplexity, budget.max_perplexity if budget is not None else None
    bounded = replies is not None and most is not None
    if replies is not None and most is not None and replies.most > most:
        found, dear = times_told(replies), f"where --max-perplexity allows {most:g} before rounding"
        yield f"LOSS in {section.precision}: replies have {found} times the perplexity, {dear}."
    # Within a bound on replies many tokens may change.
    if (allowed is not None and changed.most > allowed) or (not bounded and changed.value > 1 - FEW_AGREE):
        above = "" if allowed is None else f", where --max-loss allows {percent(allowed)} before rounding"
        yield f"LOSS in {section.precision}: {with_interval(changed, percent)} of the next tokens change{above}."
    yield rounding_verdict(section)


def _milder(budget: BudgetSection | None) -> str:
    """What cuts less, in terms of the option that was the budget."""
    if budget is None:
        return "a larger budget"
    bounds = {"--max-loss": budget.max_loss, "--max-perplexity": budget.max_perplexity}
    if floors := [flag for flag, most in bounds.items() if most is not None]:
        return f"a smaller {' or '.join(floors)}"
    if budget.strength is not None:
        return "a smaller --strength"
    if budget.unit == "memory":
        return "a larger --max-memory"
    if budget.unit == "latency":
        return "a larger --max-latency"
    if budget.params_requested is not None:
        return "a larger --max-params"
    return "a larger --size" if budget.unit == "parameters" else "a larger --keep"


def _exact_match(report: Report, ours: QualityRow) -> Iterator[str]:
    dense = next((row for row in report.quality if row.role == "dense"), None)
    if dense is None or dense.exact_match is None or ours.exact_match is None:
        return
    alarm = "LOSS: " if ours.exact_match.value < dense.exact_match.value else ""
    right, before = with_interval(ours.exact_match, percent), with_interval(dense.exact_match, percent)
    yield f"{alarm}{right} of the answers are right, the dense model's are {before}."


def _turned(agreement: Estimate) -> str:
    if agreement.low is None or agreement.high is None:
        return " (too few prompts for an interval)"
    return f" ({percent(1 - agreement.high)} to {percent(1 - agreement.low)})"


def _protected(report: Report) -> Iterator[str]:
    for one in report.protected:
        found = f"{with_interval(one.loss, percent)} of the next tokens change on held-out prompts"
        if one.holds:
            yield f"{one.domain} is protected: {found}, of {percent(one.max_loss)} that are allowed."
        else:
            chance = "" if one.broken else ", by no more than chance may do"
            yield f"LOSS: {one.domain} was to be protected: {found}, above the {percent(one.max_loss)} allowed{chance}."


def _baselines(report: Report) -> Iterator[str]:
    ours = ours_of(report)
    if ours is None:
        return
    for row in report.quality:
        if row.role in ("random", "domain-free", "criterion"):
            yield f"Against {row.name} at the same budget: {_against(ours, row)}."


def _against(ours: QualityRow, other: QualityRow) -> str:
    gap = other.kl_above_ours
    if gap is not None and gap.low is not None and gap.high is not None:
        if gap.low <= 0 <= gap.high:
            return "no measurable difference"
        return "ours is closer to the dense model" if gap.low > 0 else "ours is FURTHER from the dense model"
    a, b = ours.mean_kl, other.mean_kl
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return "too few prompts to tell"
    if a.high < b.low:
        return "ours is closer to the dense model"
    return "ours is FURTHER from the dense model" if b.high < a.low else "no measurable difference"


def _repair(report: Report) -> Iterator[str]:
    repair = report.repair
    if repair is None:
        return
    reason = f" ({repair.reason})" if repair.reason else ""
    if not repair.used:
        yield f"The repair was not used{reason}."
    elif repair.kl_before is not None and repair.kl_after is not None:
        before, after = figures(repair.kl_before), figures(repair.kl_after)
        yield f"The repair changed the mean KL from {before} to {after} nats{reason}."


def _sizes(report: Report) -> Iterator[str]:
    sizes = report.sizes
    if sizes is None:
        return
    if sizes.parameters.dense == sizes.parameters.sliced:
        yield "Nothing was cut: the sliced model is as large as the dense one."
        return
    yield (
        f"Parameters {change(sizes.parameters.dense, sizes.parameters.sliced)}, "
        f"KV cache per token {change(sizes.kv_bytes_per_token.dense, sizes.kv_bytes_per_token.sliced)}; "
        f"{_prunable(report.mask, sizes)}."
    )


def _prunable(mask: MaskSection | None, sizes: SizesSection) -> str:
    if mask is not None and mask.removed:
        whole = f"of {mask.layers} layers {len(mask.removed)} are gone whole ({layers_named(mask.removed)})"
        return whole + (f", and of {layers_named(mask.silent)} the attention" if mask.silent else "")
    if mask is not None and mask.silent:
        attention = f"the attention of {len(mask.silent)} is gone ({layers_named(mask.silent)})"
        return f"of {mask.layers} layers {attention}; all heads are {percent(sizes.prunable_share)} of the parameters"
    return f"heads are {percent(sizes.prunable_share)} of this model's parameters, {_rest(sizes)}"


def _rest(sizes: SizesSection) -> str:
    if sizes.channel_share is None:
        return "so no more could go"
    return f"channels of its MLPs {percent(sizes.channel_share)}"


def _latency(report: Report) -> Iterator[str]:
    if report.latency is None:
        yield "Speed was not measured."
        return
    for row in report.latency.rows:
        if row.metric in SPOKEN_METRICS:
            under = f" ({row.load})" if row.load else ""
            yield f"{row.contender} against {row.reference}, {row.metric}{under}: {_speed(row)}."
    for prediction in report.latency.predictions:
        yield _predicted(prediction)


def _predicted(p: PredictionRow) -> str:
    """What the bytes predict, what came, and from the numbers why it is not more."""
    told = (
        f"Decoding, {p.contender} against {p.reference} ({p.load}): its bytes predict {figures(p.predicted)} times, "
        f"measured were {with_interval(p.measured)}"
    )
    if p.measured.low is None or p.measured.high is None:
        return f"{told}, from too few processes for an interval."
    if p.measured.low <= p.predicted <= p.measured.high:
        if p.measured.low <= 1 <= p.measured.high:
            return f"{told}, which cannot tell that from no change."
        return f"{told}, which agrees."
    if p.measured.low > p.predicted:
        return f"{told}, more than reading saves: there is also less to compute and to call."
    rest = 1 - p.reference_share
    if rest > MUCH_ELSE:
        return (
            f"{told}; reading bytes takes {percent(p.reference_share)} of a step of {p.reference}, and the other "
            f"{percent(rest)} do not shrink with the bytes."
        )
    return f"{told}; this runtime does not turn the saved bytes into time."


def _speed(row: LatencyRow) -> str:
    if row.improvement is None or row.verdict in ("no measurable change", "too few samples"):
        return row.verdict or "no comparison"
    if row.verdict == "worse":
        inverse = row.improvement
        turned = Estimate(
            value=1 / inverse.value,
            low=1 / inverse.high if inverse.high else None,
            high=1 / inverse.low if inverse.low else None,
        )
        return f"LOSS: {with_interval(turned)} times that of {row.reference}"
    word = "faster" if row.unit == "s" else "smaller"
    return f"{with_interval(row.improvement)} times {word}"


def _scenario(report: Report) -> Iterator[str]:
    scenario = report.scenario
    if scenario is not None and scenario.fits_no_domain:
        yield (
            f"{percent(scenario.unknown)} of the scenario fits no known domain; for that share all domains count alike."
        )
