"""What a report says of the budget: what was allowed, what is kept, and what was measured on the way to that."""

from __future__ import annotations

from collections.abc import Iterator

from sspcompile.report.blocks import Table
from sspcompile.report.format import count, figures, percent, seconds, size
from sspcompile.report.model import BudgetSection


def budget_sentence(budget: BudgetSection) -> str:
    """In the unit of the budget, and what that leaves of the heads where it is another."""
    kept = f"{percent(budget.keep_achieved)} of the heads are kept"
    if budget.unit != "heads" and budget.size_achieved is not None:
        kept = (
            f"{percent(budget.size_achieved)} of the parameters are kept, {percent(budget.keep_achieved)} of the heads"
        )
    if budget.memory_achieved is not None:
        kept = f"{size(budget.memory_achieved)} are taken, {kept}"
    if budget.latency_achieved is not None:
        kept = f"{seconds(budget.latency_achieved)} a token are foretold, {kept}"
    if floors := [*_floors(budget)]:
        return f"The smallest mask within {' and '.join((*floors, *_numbers(budget)))}: {kept}."
    strength = f" (strength {figures(budget.strength)})" if budget.strength is not None else ""
    return f"At most {' and '.join(_allowed(budget))} were allowed{strength}; {kept}."


def _floors(budget: BudgetSection) -> Iterator[str]:
    """The bounds on what the scenario loses."""
    if budget.max_loss is not None:
        yield f"a loss of {percent(budget.max_loss)} of the next tokens"
    if budget.max_perplexity is not None:
        yield f"{budget.max_perplexity:g} times the perplexity of replies"


def walked(budget: BudgetSection | None) -> Iterator[Table]:
    """What every mask on the way lost, and at most, by the interval that the bound is for."""
    if budget is None or not budget.measured:
        return
    most = [percent(one) for one in budget.at_most] or ["-"] * len(budget.measured)
    rows = [(percent(share), percent(loss), end) for (share, loss), end in zip(budget.measured, most, strict=True)]
    head: tuple[str, ...] = (f"share of the {budget.unit}", "next tokens that change", "at most (95 %)")
    told: list[tuple[str, ...]] = [*rows]
    if budget.perplexities:
        head = (*head, "perplexity of replies, times", "at most (95 %)")
        replies = [tuple(f"{one:.3f}" for one in pair) for pair in budget.perplexities]
        told = [(*row, *pair) for row, pair in zip(rows, replies, strict=True)]
    yield Table("What other sizes lost, on the prompts that decide", head, tuple(told))


def _allowed(budget: BudgetSection) -> Iterator[str]:
    """Shares as they were asked for, a number of parameters with the share that it is."""
    if budget.unit == "heads":
        yield f"{percent(budget.keep_requested)} of the heads"
    if budget.size_requested is not None:
        number = budget.params_requested
        within = "" if number is None else f", no more than {count(number)},"
        yield f"{percent(budget.size_requested)} of the parameters{within}"
    yield from _served(budget)


def _numbers(budget: BudgetSection) -> Iterator[str]:
    """The bounds that were given as numbers, not as shares."""
    if budget.params_requested is not None:
        yield f"{count(budget.params_requested)} parameters"
    yield from _served(budget)


def _served(budget: BudgetSection) -> Iterator[str]:
    if budget.memory_requested is not None and budget.context is not None and budget.batch is not None:
        several = "one sequence" if budget.batch == 1 else f"{count(budget.batch)} sequences"
        cache = f"the KV cache of {several} of {count(budget.context)} tokens"
        yield f"{size(budget.memory_requested)} of memory (weights and {cache})"
    if budget.latency_requested is not None:
        yield f"{seconds(budget.latency_requested)} for a decoded token"
