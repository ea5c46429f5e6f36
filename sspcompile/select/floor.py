"""The smallest mask that loses no more than a bound, found by measuring a few on the texts that decide.

Per layer, masks of one ranking are nested in the budget, so what they lose falls with what they keep, but for chance.
Each round measures AT_ONCE masks between the largest that lost too much and the smallest that did not. The budget is a
share of all parameters where channels of the MLPs may go too, of the heads otherwise. Where other bounds hold beside
the one on the loss, the walk begins at the largest mask within them, and in the unit of the tightest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.model.divergence import Divergence
from sspcompile.model.text import batches_of
from sspcompile.progress import stage_of
from sspcompile.select.budget import FLAGS, bounded
from sspcompile.select.judging import Judge
from sspcompile.select.reading import Reading, choices_for, within
from sspcompile.select.search import comparison_parts
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.measures import Bound, Unit

# The first masks stand closer where real models begin to lose; three at a time then leave a quarter of what is in
# question: after three rounds one in a hundred there, two or three further down.
FIRST: Mapping[Unit, tuple[float, ...]] = {
    "heads": (0.9, 0.75, 0.5),
    "parameters": (0.95, 0.88, 0.75),
    "memory": (0.95, 0.88, 0.75),
}
AT_ONCE = 3
ROUNDS = 3


@dataclass(frozen=True)
class Rung:
    """A mask that was measured: what it keeps of the unit, and the share of next tokens that changed hands."""

    kept: float
    loss: float


@dataclass(frozen=True)
class Floor:
    """`keep` is the smallest share of the `unit` that loses no more than `max_loss`, `failed` the largest that lost
    more (0 where none did). `tried`: every mask that was measured, by share.
    """

    max_loss: float
    keep: float
    failed: float
    tried: tuple[Rung, ...]
    unit: Unit = "heads"

    def larger(self, keep: float, bounds: Sequence[Bound] = ()) -> float:
        """The next larger share that was within the bound. Raises BudgetError when only all heads are left, or what no
        other of the `bounds` allows.
        """
        larger = (one.kept for one in self.tried if one.kept > keep and one.loss <= self.max_loss)
        found = min(larger, default=None)
        if found is None:
            raise _nothing_within(self.max_loss, self.tried, self.unit, bounds)
        return found


def loss_of(divergence: Divergence) -> float:
    """The share of next tokens that are not the dense model's, mean over prompts."""
    return 1.0 - divergence.top1_agreement.value


def smallest_within(judge: Judge, reading: Reading, max_loss: float) -> Floor:
    """Measure masks of the reading's own ranking, each with a repair that a part of the texts fits.

    Raises BudgetError, which names the mask that came closest, when no mask is within the bound, and what `choices_for`
    raises.
    """
    geometry, budget = judge.loaded.geometry, reading.budget
    # The finer of the layouts that a class can hold: per-layer where both are asked for.
    layout = [*choices_for(reading, geometry)][-1]
    fit = batches_of(judge.loaded, comparison_parts(judge)[0])

    def choice_of(share: float) -> Choice:
        return within(replace(reading, budget=budget.at(share)), geometry, layout)[0]

    def kept_of(choice: Choice) -> float:
        return budget.share(choice, geometry)

    def measure(choices: Sequence[Choice], number: int) -> list[Rung]:
        report = stage_of(judge.progress, f"smallest mask within the loss (round {number + 1} of {ROUNDS})")
        repairs = judge.fitted([choice.units for choice in choices], fit, report)
        return [
            Rung(kept_of(choice), loss_of(judge.candidate(layout, choice, repair).final))
            for choice, repair in zip(choices, repairs, strict=True)
        ]

    channels = reading.worth().channels is not None
    least = budget.least(
        geometry, channels=channels, groups_only=reading.groups_only, layers=reading.options.removes_layers
    )
    return descend(choice_of, measure, kept_of, least, max_loss, unit=budget.unit, bounds=asked_beside(reading))


def asked_beside(reading: Reading) -> tuple[Bound, ...]:
    """The bounds that were asked for beside the one on the loss."""
    return reading.budget.bounds if bounded(reading.options) else ()


def descend(
    choice_of: Callable[[float], Choice],
    measure: Callable[[Sequence[Choice], int], list[Rung]],
    kept_of: Callable[[Choice], float],
    least: float,
    max_loss: float,
    *,
    unit: Unit = "heads",
    bounds: Sequence[Bound] = (),
) -> Floor:
    """Walk down from the largest mask to the smallest share of at least `least` that `measure` finds within `max_loss`.

    `choice_of` gives the mask of a share, which keeps within the `bounds` too, `kept_of` the share of a mask, `measure`
    what masks lose, once for every round. Raises BudgetError when no mask is within the bound.
    """
    most = kept_of(choice_of(1.0)) if bounds else 1.0
    found: dict[float, Rung] = {}
    failed, keep = 0.0, None
    for number in range(ROUNDS):
        # Of a small model with a large vocabulary more than all of FIRST stays whatever is cut.
        between = [share for share in FIRST[unit] if least <= share < most] if number == 0 else []
        between = between or np.linspace(max(failed, least), keep or most, AT_ONCE + 2)[1:-1].tolist()
        if number == 0 and most < 1:  # nothing that lies above it is in question
            between = [1.0, *between[: AT_ONCE - 1]]
        choices = {kept_of(choice): choice for choice in map(choice_of, between)}
        new = {kept: choice for kept, choice in choices.items() if failed < kept < (keep or 1.0)}
        if not new:
            break
        found |= {one.kept: one for one in measure([*new.values()], number)}
        ordered = sorted(found.values(), key=lambda one: -one.kept)
        inside = [one.kept for one, worst in zip(ordered, _running_worst(ordered), strict=True) if worst <= max_loss]
        keep = min(inside, default=None)
        failed = max((one.kept for one in ordered if one.kept < (keep or 1.0)), default=0.0)
        if keep is None and most < 1:
            break  # the largest that the bounds allow loses too much
    tried = tuple(sorted(found.values(), key=lambda one: one.kept))
    if keep is None:
        raise _nothing_within(max_loss, tried, unit, bounds)
    return Floor(max_loss, keep, failed, tried, unit)


def _running_worst(ordered: list[Rung]) -> list[float]:
    """The largest loss of each and all before it: a lucky mask below one that failed is not taken."""
    return np.maximum.accumulate([one.loss for one in ordered]).tolist()


def _nothing_within(max_loss: float, tried: tuple[Rung, ...], unit: Unit, bounds: Sequence[Bound] = ()) -> BudgetError:
    nearest = min(tried, key=lambda one: one.loss, default=None)
    told = "no smaller mask could be measured"
    if nearest is not None:
        told = f"the nearest, {100 * nearest.kept:.1f} % of the {unit}, changes {100 * nearest.loss:.1f} %"
    within = f" within {' and '.join(map(str, bounds))}" if bounds else ""
    other = f"a larger {bounds[0].flag if len(bounds) == 1 else 'budget'}" if bounds else f"a {FLAGS[unit]}"
    hint = f"Give --max-loss {np.ceil(nearest.loss * 1000) / 1000:g}, or {other}." if nearest else f"Give {other}."
    return BudgetError(f"No mask{within} changes at most {100 * max_loss:g} % of the next tokens: {told}.", hint=hint)
