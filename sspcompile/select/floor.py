"""The smallest mask that loses no more than a bound, found by measuring a few on the texts that decide.

Per layer, masks of one ranking are nested in the budget, so what they lose falls with what they keep, but for chance.
Each round measures AT_ONCE masks between the largest that lost too much and the smallest that did not. The budget is a
share of all parameters where channels of the MLPs may go too, of the heads otherwise. Where other bounds hold beside
the one on the loss, the walk begins at the largest mask within them, and in the unit of the tightest.

Protected domains have bounds of their own, measured on guard texts of theirs, and a mask holds where all of them do.
Where that is not possible within other bounds, a second walk above those finds what would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.intervals import Estimate
from sspcompile.model.text import batches_of
from sspcompile.progress import stage_of
from sspcompile.request.options import Options
from sspcompile.select.budget import FLAGS, bounded
from sspcompile.select.judging import Candidate, Judge
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
    "latency": (0.95, 0.88, 0.75),
}
AT_ONCE = 3
ROUNDS = 3


@dataclass(frozen=True)
class Rung:
    """A mask that was measured: what it keeps of the unit, and the share of next tokens that changed hands, on the
    scenario's texts and on those of every protected domain, in their order.
    """

    kept: float
    loss: Estimate
    protected: tuple[Estimate, ...] = ()


@dataclass(frozen=True)
class Allowed:
    """The share of next tokens that may change hands: on the scenario's texts (None: any), and by protected domain.

    A bound is for the upper end of the interval that the texts give: of masks that are searched for the smallest, the
    one that is taken owes a part of its figure to chance. A mask that changes nothing on the texts is within any bound,
    whatever so few can show: that is all that the dense model could show on them.
    """

    max_loss: float | None
    protect: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def by(cls, options: Options) -> Allowed:
        """What the options state."""
        return cls(options.max_loss, options.protect or {})

    def excess(self, one: Rung) -> float:
        """By how much a mask is above the bound that it is furthest above; 0 or less where all hold."""
        over = [_above(lost, most) for lost, most in zip(one.protected, self.protect.values(), strict=True)]
        return max(over if self.max_loss is None else [_above(one.loss, self.max_loss), *over])

    def by_chance(self, one: Rung) -> bool:
        """Whether a mask is within the bounds by what was measured, and above one by its interval alone."""
        pairs = [*zip((lost.value for lost in one.protected), self.protect.values(), strict=True)]
        if self.max_loss is not None:
            pairs.append((one.loss.value, self.max_loss))
        return self.excess(one) > 0 and all(value <= most for value, most in pairs)

    def __str__(self) -> str:
        """As what is said of a mask: `changes at most ...`."""
        of = [f"{100 * most:g} % of those of {name}" for name, most in self.protect.items()]
        if self.max_loss is None:
            return " and ".join(of).replace("those", "the next tokens", 1)
        return " and ".join([f"{100 * self.max_loss:g} % of the next tokens", *of])

    def told(self, one: Rung) -> str:
        """What a mask changes, in the order of the bounds."""
        own = [] if self.max_loss is None else [_percent(one.loss)]
        of = zip(self.protect, one.protected, strict=True)
        return " and ".join([*own, *(f"{_percent(lost)} of those of {name}" for name, lost in of)])

    def looser(self, one: Rung) -> Iterator[str]:
        """The options that would let a mask pass, for the bounds that it is above."""
        if self.max_loss is not None and (_above(one.loss, self.max_loss) > 0 or not self.protect):
            yield f"--max-loss {_up(one.loss.most)}"
        for (name, most), lost in zip(self.protect.items(), one.protected, strict=True):
            if _above(lost, most) > 0:
                yield f"--protect {name}={_up(lost.most)}"


def _above(loss: Estimate, most: float) -> float:
    """By how much a loss may be above a bound; not at all where there is none."""
    return (loss.most if loss.value > 0 else 0.0) - most


def _percent(loss: Estimate) -> str:
    """As measured, and at most."""
    return f"{100 * loss.value:.1f} %" + (f" ({100 * loss.high:.1f} % at most)" if loss.high is not None else "")


def _up(loss: float) -> str:
    """A share that is typed, no smaller than the one that was measured."""
    return f"{np.ceil(loss * 1000) / 1000:g}"


@dataclass(frozen=True)
class Floor:
    """`keep` is the smallest share of the `unit` that loses no more than `max_loss`, and by domain than `protect` says,
    `failed` the largest that lost more (0 where none did). `tried`: every mask that was measured, by share.
    """

    max_loss: float | None
    keep: float
    failed: float
    tried: tuple[Rung, ...]
    unit: Unit = "heads"
    protect: Mapping[str, float] = field(default_factory=dict)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data; nothing of protected domains where there are none."""
        found = asdict(self)
        if not self.protect:
            del found["protect"]
            found["tried"] = tuple({"kept": one.kept, "loss": asdict(one.loss)} for one in self.tried)
        return found

    def larger(self, keep: float) -> float | None:
        """The next larger share that was within the bounds; None where there is none."""
        allowed = Allowed(self.max_loss, self.protect)
        return min((one.kept for one in self.tried if one.kept > keep and allowed.excess(one) <= 0), default=None)


def lost(judge: Judge, candidate: Candidate, kept: float) -> Rung:
    """What a candidate, which keeps so much of the unit, loses on the guard texts."""
    protected = judge.protected("guard", candidate.choice.units, candidate.final_repair)
    return Rung(kept, candidate.final.changed, tuple(one.changed for one in protected.values()))


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
        report = stage_of(judge.progress, f"smallest mask within the loss (round {number + 1} of {ROUNDS})")
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
    return Floor(allowed.max_loss, keep, failed, tried, unit, allowed.protect)


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


def descend(
    choice_of: Callable[[float], Choice],
    measure: Callable[[Sequence[Choice], int], list[Rung]],
    kept_of: Callable[[Choice], float],
    least: float,
    allowed: Allowed,
    *,
    unit: Unit = "heads",
    bounded: bool = False,
    failed: float = 0.0,
) -> tuple[tuple[Rung, ...], float | None, float]:
    """Walk down from the largest mask to the smallest share of at least `least` that loses no more than is allowed.

    `choice_of` gives the mask of a share, `kept_of` the share of a mask, `measure` what masks lose, once for every
    round. `bounded`: whether other bounds say what the largest mask is. `failed`: a share that is known to lose more.
    Gives every mask that was measured, by share, the smallest share that will do (None where there is none), and the
    largest that lost more.
    """
    most = kept_of(choice_of(1.0)) if bounded else 1.0
    found: dict[float, Rung] = {}
    known, keep = failed, None
    for number in range(ROUNDS):
        # Of a small model with a large vocabulary more than all of FIRST stays whatever is cut.
        between = [share for share in FIRST[unit] if least <= share < most and share > failed] if number == 0 else []
        between = between or np.linspace(max(failed, least), keep or most, AT_ONCE + 2)[1:-1].tolist()
        if number == 0 and most < 1:  # nothing that lies above it is in question
            between = [1.0, *between[: AT_ONCE - 1]]
        choices = {kept_of(choice): choice for choice in map(choice_of, between)}
        new = {kept: choice for kept, choice in choices.items() if failed < kept < (keep or 1.0)}
        if not new:
            break
        found |= {one.kept: one for one in measure([*new.values()], number)}
        ordered = sorted(found.values(), key=lambda one: -one.kept)
        worst = _running_worst([allowed.excess(one) for one in ordered])
        inside = [one.kept for one, excess in zip(ordered, worst, strict=True) if excess <= 0]
        keep = min(inside, default=None)
        failed = max((one.kept for one in ordered if one.kept < (keep or 1.0)), default=known)
        if keep is None and most < 1:
            break  # the largest that the bounds allow loses too much
    return tuple(sorted(found.values(), key=lambda one: one.kept)), keep, failed


def _running_worst(excess: list[float]) -> list[float]:
    """The largest of each and all before it: a lucky mask below one that failed is not taken."""
    return np.maximum.accumulate(excess).tolist()


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
    nearest = min((one for one in tried if allowed.excess(one) > 0), key=allowed.excess, default=None)
    told = "no smaller mask could be measured"
    if nearest is not None:
        told = f"the nearest, {100 * nearest.kept:.1f} % of the {unit}, changes {allowed.told(nearest)}"
    within = f" within {' and '.join(map(str, bounds))}" if bounds else ""
    other = f"a larger {bounds[0].flag if len(bounds) == 1 else 'budget'}" if bounds else f"a {FLAGS[unit]}"
    if held is not None:
        told, other = f"{told}; the smallest that holds, as measured, keeps {100 * held[0]:.1f} %", held[1]
    hint = f"Give {' '.join(allowed.looser(nearest))}, or {other}." if nearest else f"Give {other}."
    if above and nearest is not None:
        best = min(above, key=allowed.excess)
        told = f"{told}; above that, {100 * best.kept:.1f} % still changes {allowed.told(best)}"
        hint = f"Give {' '.join(allowed.looser(nearest))}."
    if nearest is not None and allowed.by_chance(nearest):
        hint = f"{hint} More prompts of your own make the interval narrower."
    return BudgetError(f"No mask{within} changes at most {allowed}: {told}.", hint=hint)
