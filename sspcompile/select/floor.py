"""The smallest mask that loses no more than a bound, found by measuring a few on the texts that decide.

Per layer, masks of one ranking are nested in the budget, so what they lose falls with what they keep, but for chance.
Each round measures AT_ONCE masks between the largest that lost too much and the smallest that did not. The budget is a
share of all parameters where channels of the MLPs may go too, of the heads otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.families import Geometry
from sspcompile.model.divergence import Divergence
from sspcompile.model.text import batches_of
from sspcompile.progress import stage_of
from sspcompile.select.judging import Judge
from sspcompile.select.reading import Reading, choices_for, sized
from sspcompile.select.search import comparison_parts
from sspcompile.slicing.layouts import Choice, choose, smallest_keep
from sspcompile.slicing.sizes import share_of, smallest_size

Unit = Literal["heads", "parameters"]
# The first masks stand closer where real models begin to lose; three at a time then leave a quarter of what is in
# question: after three rounds one in a hundred there, two or three further down.
FIRST: Mapping[Unit, tuple[float, ...]] = {"heads": (0.9, 0.75, 0.5), "parameters": (0.95, 0.88, 0.75)}
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

    def larger(self, keep: float) -> float:
        """The next larger share that was within the bound. Raises BudgetError when only all heads are left."""
        larger = (one.kept for one in self.tried if one.kept > keep and one.loss <= self.max_loss)
        found = min(larger, default=None)
        if found is None:
            raise _nothing_within(self.max_loss, self.tried, self.unit)
        return found

    def applied(self, reading: Reading, share: float) -> Reading:
        """The reading with a share of the unit as its budget."""
        return replace(reading, size=share) if self.unit == "parameters" else replace(reading, keep=share)

    def share(self, choice: Choice, geometry: Geometry) -> float:
        """What a mask keeps of the unit."""
        return share_of(geometry, choice) if self.unit == "parameters" else choice.ratio


def loss_of(divergence: Divergence) -> float:
    """The share of next tokens that are not the dense model's, mean over prompts."""
    return 1.0 - divergence.top1_agreement.value


def smallest_within(judge: Judge, reading: Reading, max_loss: float) -> Floor:
    """Measure masks of the reading's own ranking, each with a repair that a part of the texts fits.

    Raises BudgetError, which names the mask that came closest, when no mask is within the bound, and what `choices_for`
    raises.
    """
    geometry, groups_only = judge.loaded.geometry, reading.groups_only
    channels = reading.worth().channels is not None
    none = Floor(max_loss, 1.0, 0.0, (), "parameters" if channels else "heads")
    # The finer of the layouts that a class can hold: per-layer where both are asked for.
    layout = [*choices_for(reading, geometry)][-1]
    fit = batches_of(judge.loaded, comparison_parts(judge)[0])

    def choice_of(share: float) -> Choice:
        if channels:
            return sized(none.applied(reading, share), geometry, layout, reading.worth())[0]
        return choose(reading.merit, geometry.kv_heads, share, layout, groups_only=groups_only)

    def measure(choices: Sequence[Choice], number: int) -> list[Rung]:
        report = stage_of(judge.progress, f"smallest mask within the loss (round {number + 1} of {ROUNDS})")
        repairs = judge.fitted([choice.units for choice in choices], fit, report)
        return [
            Rung(none.share(choice, geometry), loss_of(judge.candidate(layout, choice, repair).final))
            for choice, repair in zip(choices, repairs, strict=True)
        ]

    if channels:
        least = smallest_size(geometry, channels=True, groups_only=groups_only)
    else:
        least = smallest_keep(geometry.heads, geometry.kv_heads, groups_only=groups_only)
    return descend(choice_of, measure, lambda choice: none.share(choice, geometry), least, none)


def descend(
    choice_of: Callable[[float], Choice],
    measure: Callable[[Sequence[Choice], int], list[Rung]],
    kept_of: Callable[[Choice], float],
    least: float,
    asked: Floor,
) -> Floor:
    """Walk down from everything to the smallest share of at least `least` that `measure` finds within the bound.

    `choice_of` gives the mask of a share, `kept_of` the share of a mask, `measure` what masks lose, once for every
    round. `asked` has the bound and the unit. Raises BudgetError when no mask is within the bound.
    """
    max_loss, unit = asked.max_loss, asked.unit
    found: dict[float, Rung] = {}
    failed, keep = 0.0, 1.0
    for number in range(ROUNDS):
        between = [share for share in FIRST[unit] if share >= least] if number == 0 else []
        # Of a small model with a large vocabulary more than all of FIRST stays whatever is cut.
        choices = [choice_of(share) for share in between or np.linspace(max(failed, least), keep, AT_ONCE + 2)[1:-1]]
        new = {kept_of(choice): choice for choice in choices if failed < kept_of(choice) < keep}
        if not new:
            break
        found |= {one.kept: one for one in measure([*new.values()], number)}
        ordered = sorted(found.values(), key=lambda one: -one.kept)
        within = [one.kept for one, worst in zip(ordered, _running_worst(ordered), strict=True) if worst <= max_loss]
        keep = min(within, default=1.0)
        failed = max((one.kept for one in ordered if one.kept < keep), default=0.0)
    tried = tuple(sorted(found.values(), key=lambda one: one.kept))
    if keep == 1.0:
        raise _nothing_within(max_loss, tried, unit)
    return Floor(max_loss, keep, failed, tried, unit)


def _running_worst(ordered: list[Rung]) -> list[float]:
    """The largest loss of each and all before it: a lucky mask below one that failed is not taken."""
    return np.maximum.accumulate([one.loss for one in ordered]).tolist()


def _nothing_within(max_loss: float, tried: tuple[Rung, ...], unit: Unit) -> BudgetError:
    nearest = min(tried, key=lambda one: one.loss, default=None)
    told = "no smaller mask could be measured"
    if nearest is not None:
        told = f"the nearest, {100 * nearest.kept:.1f} % of the {unit}, changes {100 * nearest.loss:.1f} %"
    flag = "--size" if unit == "parameters" else "--keep"
    hint = f"Give --max-loss {np.ceil(nearest.loss * 1000) / 1000:g}, or a {flag}." if nearest else f"Give a {flag}."
    return BudgetError(f"No mask changes at most {100 * max_loss:g} % of the next tokens: {told}.", hint=hint)
