"""What is said of bounds on what the scenario loses: whether texts that decided nothing keep within them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sspcompile.intervals import Estimate
from sspcompile.report.format import percent, with_interval
from sspcompile.report.model import BudgetSection, QualityRow


@dataclass(frozen=True)
class Held:
    """A bound, what judging texts lose of it, and both in words."""

    flag: str
    lost: Estimate
    most: float
    found: str
    allowed: str

    @property
    def exceeded(self) -> bool:
        return self.lost.value > self.most

    @property
    def broken(self) -> bool:
        """Whether more is lost by more than chance may do."""
        return self.lost.low is not None and self.lost.low > self.most

    @property
    def told(self) -> str:
        return f"{self.found}, of {self.allowed} allowed"


def broken_bounds(ours: QualityRow, budget: BudgetSection | None) -> list[Held]:
    """The bounds that judging texts are above by more than chance may do."""
    return [one for one in _bounds(ours, budget) if one.broken]


def times_told(perplexity: Estimate) -> str:
    """With three decimals: bounds on it lie close to 1."""
    low, high = perplexity.low, perplexity.high
    return f"{perplexity.value:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def bounds_told(ours: QualityRow, budget: BudgetSection | None) -> Iterator[str]:
    """What replies lose where that was bounded, and where texts that decided nothing lose more than was allowed on
    those that did.
    """
    for one in _bounds(ours, budget):
        chance = "" if one.broken else ", by no more than chance may do"
        if one.flag == "--max-perplexity":
            told = f"{one.told[0].lower()}{one.told[1:]}" if one.exceeded else one.told
            yield f"{'LOSS: ' * one.exceeded}{told}{chance * one.exceeded}."
        elif one.exceeded:
            yield f"That is above the {one.allowed} that {one.flag} allows{chance}."
    if (least := _least_shown(budget)) is not None:
        yield (
            f"The prompts that decide have too few tokens to show {percent(least[1])}: even a model that changes none "
            f"of them shows no less than {percent(least[0])}. More prompts of your own would tell."
        )


def _bounds(ours: QualityRow, budget: BudgetSection | None) -> Iterator[Held]:
    if budget is not None and budget.max_loss is not None:
        changed = ours.top1_agreement.rest
        differ = "of the next tokens on the scenario's own domain differ from the dense model's"
        found, allowed = f"{with_interval(changed, percent)} {differ}", percent(budget.max_loss)
        yield Held("--max-loss", changed, budget.max_loss, found, allowed)
    if budget is not None and budget.max_perplexity is not None and ours.reply_perplexity is not None:
        replies, most = ours.reply_perplexity, budget.max_perplexity
        found = f"Held-out replies have {times_told(replies)} times the perplexity that the dense model gives them"
        yield Held("--max-perplexity", replies, most, found, f"{most:g} times")


def _least_shown(budget: BudgetSection | None) -> tuple[float, float] | None:
    """The loss that a mask which changed nothing may yet have, and the bound, where that is above it."""
    if budget is None or budget.max_loss is None:
        return None
    nothing = [most for (_, loss), most in zip(budget.measured, budget.at_most, strict=False) if loss == 0]
    return (nothing[0], budget.max_loss) if nothing and nothing[0] > budget.max_loss else None
