"""The smallest mask that loses no more than a bound, found by measuring a few on the texts that decide.

Per layer, masks of one ranking are nested in the budget, so what they lose falls with what they keep, but for chance;
descent.py says which of them are measured. The budget is a share of all parameters where channels of the MLPs may go
too, of the heads otherwise. Where other bounds hold beside the one on the loss, the walk begins at the largest mask
within them, and in the unit of the tightest.

Protected domains have bounds of their own, measured on guard texts of theirs, and a mask holds where all of them do.
Where that is not possible within other bounds, a second walk above those finds what would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sspcompile.errors import BudgetError
from sspcompile.model.text import batches_of
from sspcompile.progress import stage_of
from sspcompile.select.allowed import Allowed, Rung
from sspcompile.select.budget import FLAGS, bounded
from sspcompile.select.descent import ROUNDS, descend
from sspcompile.select.judging import Candidate, Judge
from sspcompile.select.reading import Reading, choices_for, within
from sspcompile.select.search import comparison_parts
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.measures import Bound, Unit


@dataclass(frozen=True)
class Floor:
    """`keep` is the smallest share of the `unit` that loses no more than `max_loss`, and by domain than `protect` says,
    `failed` the largest that does not count as within (0 where all do; descent.py). `tried`: every mask that was
    measured, by share. `size`: the share of all parameters that was asked for beside, if one was. `max_perplexity`:
    what replies may have, times the dense model's.
    """

    max_loss: float | None
    keep: float
    failed: float
    tried: tuple[Rung, ...]
    unit: Unit = "heads"
    protect: Mapping[str, float] = field(default_factory=dict)
    size: float | None = None
    max_perplexity: float | None = None

    def as_mapping(self) -> dict[str, Any]:
        """Plain data; nothing of what was not bounded."""
        asked = {"protect": bool(self.protect), "size": self.size is not None, "max_perplexity": self._of_replies}
        of_tried = {"protected": asked["protect"], "perplexity": self._of_replies}

        def without(found: dict[str, Any], asked: Mapping[str, bool]) -> dict[str, Any]:
            return {name: value for name, value in found.items() if asked.get(name, True)}

        found = without(asdict(self), asked)
        return found | {"tried": tuple(without(asdict(one), of_tried) for one in self.tried)}

    @property
    def _of_replies(self) -> bool:
        return self.max_perplexity is not None

    def larger(self, keep: float) -> float | None:
        """The next larger share that was within the bounds; None where there is none."""
        allowed = Allowed(self.max_loss, self.protect, self.max_perplexity)
        return min((one.kept for one in self.tried if one.kept > keep and allowed.excess(one) <= 0), default=None)


def lost(judge: Judge, candidate: Candidate, kept: float) -> Rung:
    """What a candidate, which keeps so much of the unit, loses on the guard texts."""
    protected = judge.protected("guard", candidate.choice.units, candidate.final_repair)
    found = candidate.final
    return Rung(kept, found.changed, tuple(one.changed for one in protected.values()), found.reply_perplexity)


class _Ladder:
    """The masks of a reading's own ranking, each measured with a repair that a part of the texts fits."""

    def __init__(self, judge: Judge, reading: Reading) -> None:
        self._judge, self._reading, self._g = judge, reading, judge.loaded.geometry
        # The finer of the layouts that a class can hold: per-layer where both are asked for.
        self._layout = [*choices_for(reading, self._g)][-1]
        self._fit = batches_of(judge.loaded, comparison_parts(judge)[0])

    def choice(self, share: float) -> Choice:
        reading = self._reading
        return within(replace(reading, budget=reading.budget.at(share)), self._g, self._layout)[0]

    def kept(self, choice: Choice) -> float:
        return self._reading.budget.share(choice, self._g)

    def measure(self, choices: Sequence[Choice], number: int) -> list[Rung]:
        judge = self._judge
        report = stage_of(judge.progress, f"smallest mask within the loss (round {number + 1} of at most {ROUNDS})")
        repairs = judge.fitted([choice.units for choice in choices], self._fit, report)
        return [
            lost(judge, judge.candidate(self._layout, choice, repair), self.kept(choice))
            for choice, repair in zip(choices, repairs, strict=True)
        ]

    def least(self) -> float:
        reading = self._reading
        channels = reading.worth().channels is not None
        return reading.budget.least(
            self._g, channels=channels, groups_only=reading.groups_only, whole=reading.options.whole
        )


def smallest_within(judge: Judge, reading: Reading, allowed: Allowed) -> Floor:
    """Measure masks to find the smallest that loses no more than is allowed.

    Raises BudgetError when there is none, which names the mask that came closest, and with protected domains the
    smallest that would do if the other bounds were wider; and what `choices_for` raises.
    """
    ladder, unit, beside = _Ladder(judge, reading), reading.budget.unit, asked_beside(reading)
    tried, keep, failed = descend(
        ladder.choice, ladder.measure, ladder.kept, ladder.least(), allowed, unit=unit, bounded=bool(beside)
    )
    if keep is None:
        raise refused(judge, reading, allowed, tried)
    size = reading.options.size
    return Floor(allowed.max_loss, keep, failed, tried, unit, allowed.protect, size, allowed.max_perplexity)


def demand_held(judge: Judge, reading: Reading, chosen: Candidate, allowed: Allowed) -> None:
    """Raise BudgetError, as `smallest_within` does, where what was chosen loses more than is allowed."""
    found = lost(judge, chosen, reading.budget.share(chosen.choice, judge.loaded.geometry))
    if allowed.excess(found) > 0:
        raise refused(judge, reading, allowed, (found,))


def refused(judge: Judge, reading: Reading, allowed: Allowed, tried: tuple[Rung, ...]) -> BudgetError:
    """That none of the masks that were `tried` loses as little as is allowed. Where a domain is protected and other
    bounds are too tight for that, masks above those are measured.
    """
    beside, unit = asked_beside(reading), reading.budget.unit
    if not (beside and allowed.protect and tried):
        return nothing_within(allowed, tried, unit, beside)
    ladder = _Ladder(judge, replace(reading, budget=reading.budget.freed()))
    most = min(bound.share for bound in beside)
    above, keep, _ = descend(ladder.choice, ladder.measure, ladder.kept, most, allowed, unit=unit, failed=most)
    if keep is None:
        return nothing_within(allowed, tried, unit, beside, above=above)
    choice, g = ladder.choice(keep), judge.loaded.geometry
    counts = [(bound, bound.measure.kept(g, choice.shapes, choice.widths)) for bound in beside]
    typed = " ".join(bound.typed(count) for bound, count in counts if count > bound.most)
    return nothing_within(allowed, tried, unit, beside, (keep, typed) if typed else None)


def asked_beside(reading: Reading) -> tuple[Bound, ...]:
    """The bounds that were asked for beside the one on the loss."""
    return reading.budget.bounds if bounded(reading.options) else ()


def nothing_within(
    allowed: Allowed,
    tried: tuple[Rung, ...],
    unit: Unit,
    bounds: Sequence[Bound] = (),
    held: tuple[float, str] | None = None,
    above: Sequence[Rung] = (),
) -> BudgetError:
    """That all that were `tried` lose more than is allowed. `held`: the smallest share above the bounds that was
    measured to lose no more, and the options that allow it. `above`: where none was, those that were measured there.
    """
    nearest = min((one for one in tried if allowed.excess(one) > 0), key=allowed.ratio, default=None)
    told = "no smaller mask could be measured"
    if nearest is not None:
        told = f"the nearest, {100 * nearest.kept:.1f} % of the {unit}, {allowed.told(nearest)}"
    within = f" within {' and '.join(map(str, bounds))}" if bounds else ""
    other = f"a larger {bounds[0].flag if len(bounds) == 1 else 'budget'}" if bounds else f"a {FLAGS[unit]}"
    if held is not None:
        told, other = f"{told}; the smallest that holds, as measured, keeps {100 * held[0]:.1f} %", held[1]
    looser = " ".join(allowed.looser(nearest)) if nearest else ""
    hint = f"Give {looser}, or {other}." if looser else f"Give {other}."
    above = [one for one in above if allowed.excess(one) > 0]
    if above and looser:
        best = min(above, key=allowed.ratio)
        told = f"{told}; above that, {100 * best.kept:.1f} % still {allowed.told(best)}"
        hint = f"Give {looser}."
    if nearest is not None and allowed.by_chance(nearest):
        hint = f"{hint} More prompts of your own make the interval narrower."
    return BudgetError(f"No mask{within} {allowed}: {told}.", hint=hint)
