"""The results of `eval` for people: one table per suite, and one sentence that never hides a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sspcompile.evaluate.results import SuiteResult
from sspcompile.intervals import Estimate
from sspcompile.report.format import clean, figures, percent, with_interval

ROWS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "exact_match": ("exact match", percent),
    "keyword_recall": ("keyword recall", percent),
    "answer_log_likelihood": ("answer log-likelihood (nats per token)", figures),
    "mean_kl": ("KL from the dense model (nats per token)", figures),
    "top1_agreement": ("next token agrees with the dense model", percent),
}
# What answers are judged by; each of them alone is a loss when its interval lies below 0.
JUDGED = ("exact_match", "keyword_recall", "answer_log_likelihood")


def sentence(result: SuiteResult) -> str:
    """The finding on one suite, from its numbers alone."""
    kl, agreement = result.sliced["mean_kl"], result.sliced["top1_agreement"]
    if kl is not None and agreement is not None and kl.value == 0 and agreement.value == 1:
        return "no measurable change: both models computed the same."
    if result.labelled:
        return _by_answers(result)
    if agreement is None or agreement.value == 1:
        return "no measurable change of the next token; without answers no more is known."
    return f"LOSS: {percent(1 - agreement.value)} of the next tokens differ from the dense model's."


def _by_answers(result: SuiteResult) -> str:
    shown = {metric: result.difference[metric] for metric in JUDGED}
    lost = [metric for metric, mean in shown.items() if mean and mean.measurable and mean.value < 0]
    if lost:
        return "LOSS: " + ", ".join(_change(metric, shown[metric]) for metric in lost) + "."
    exact = shown["exact_match"]
    if exact is None or exact.low is None:
        return f"too few conversations for a verdict: {_change('exact_match', exact)}."
    if exact.measurable:
        return f"better: {_change('exact_match', exact)}."
    return f"no measurable change: {_change('exact_match', exact)}."


def _change(metric: str, mean: Estimate | None) -> str:
    name = ROWS[metric][0]
    if mean is None:
        return f"{name} was not measured"
    if metric == "answer_log_likelihood":
        return f"{name} {with_interval(mean)}"
    text = f"{name} {100 * mean.value:+.1f} points"
    if mean.low is None or mean.high is None:
        return text
    return f"{text} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})"


def print_results(results: Sequence[SuiteResult], console: Console) -> None:
    """Tables and sentences of all suites."""
    for result in results:
        console.print(_table(result))
        finding = sentence(result)
        console.print(Text(f"  {clean(result.name)}: {finding}", style="yellow" if "LOSS" in finding else ""))
        if result.dropped:
            console.print(f"  {result.dropped} prompts were left out: the artifact was fitted on them.")


def _table(result: SuiteResult) -> Table:
    title = f"{clean(result.name)}: {result.prompts} prompts, {result.labelled} with answers"
    table = Table(title=Text(title), title_justify="left", header_style="")
    for name in ("", "dense", "sliced", "sliced - dense"):
        table.add_column(name, justify="right" if name else "left")
    for metric, (label, show) in ROWS.items():
        cells = (result.dense[metric], result.sliced[metric], result.difference[metric])
        table.add_row(label, *(_cell(mean, show) for mean in cells))
    return table


def _cell(mean: Estimate | None, show: Callable[[float], str]) -> str:
    if mean is None:
        return "-"

    def signed(value: float) -> str:
        return f"-{show(-value)}" if value < 0 else show(value)

    if mean.low is None or mean.high is None:
        return signed(mean.value)
    return f"{signed(mean.value)} ({signed(mean.low)} to {signed(mean.high)})"
