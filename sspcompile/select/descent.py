"""The walk down to the smallest mask within a bound on the loss, in rounds of a few masks.

The first round measures fixed shares. After it the loss is read as a power of what is removed, through the two masks
next to the bound, and the next round measures where that meets the bound, a little above and a little below: by the
upper end of its interval, what SmolLM2-135M loses grows about as the power .5 to .75 of the share of the parameters
that goes, from a third of a hundredth to a quarter of them (benchmarks/results/floors-quarter.json). Where the bound
turns out not to lie there, the last round measures evenly between the largest mask that lost too much and the smallest
that did not. The walk ends where those are close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from sspcompile.select.allowed import Allowed, Rung
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.measures import Unit

# The first masks stand closer where real models begin to lose.
FIRST: Mapping[Unit, tuple[float, ...]] = {
    "heads": (0.9, 0.75, 0.5),
    "parameters": (0.95, 0.88, 0.75),
    "memory": (0.95, 0.88, 0.75),
    "latency": (0.95, 0.88, 0.75),
}
AT_ONCE = 3
# At most, and as many as real models take.
ROUNDS, USUAL_ROUNDS = 4, 3
# The largest that failed and the smallest that did not are close enough, for texts show no finer step, where
# they are no further apart than this share of what the smallest removes, within these bounds in shares of the unit.
CLOSE, CLOSE_BOUNDS = 1 / 8, (0.01, 0.02)
# Masks stand so far apart in what they remove where the bound lies between two that were measured, and at most so far
# where it lies beyond them all.
BETWEEN, BEYOND = 1.25, 2.0
# Beyond what was measured a power is taken for one of these at least, and at most.
POWERS = (0.5, 2.0)
# A mask that loses next to nothing counts as one that loses this share of the bound.
LEAST_RATIO, MOST_RATIO = 0.25, 1e9


@dataclass(frozen=True)
class _Bracket:
    """The masks measured so far, by what they keep, largest first, with their loss as a multiple of the bound: `inside`
    are within it, `outside` are the others. What masks lose rises with what goes, but for chance, so their multiples
    are those of the closest rising row (isotonic regression, by pooling neighbours: Ayer et al. 1955): a lucky mask is
    not taken where those before it say otherwise, and an unlucky one does not rule out all below it. The smallest mask
    inside is within the bound by its own multiple too, since no run ends above its mean. Multiples count between
    LEAST_RATIO and MOST_RATIO: a mask that is better than the dense model makes up for little of those that are worse.
    """

    inside: Sequence[tuple[Rung, float]]
    outside: Sequence[tuple[Rung, float]]

    @classmethod
    def of(cls, rungs: Sequence[Rung], allowed: Allowed) -> _Bracket:
        if not rungs:
            return cls((), ())
        from scipy.optimize import isotonic_regression

        ordered = sorted(rungs, key=lambda one: -one.kept)
        # Of a bound of nothing any loss is infinitely many times too large, which has no mean.
        rising = isotonic_regression(
            np.clip([allowed.ratio(one) for one in ordered], LEAST_RATIO, MOST_RATIO)
        ).x.tolist()
        pairs = list(zip(ordered, rising, strict=True))
        within = sum(ratio <= 1 for ratio in rising)
        return cls(pairs[:within], pairs[within:])

    @property
    def keep(self) -> float | None:
        return self.inside[-1][0].kept if self.inside else None

    def failed(self, known: float) -> float:
        return self.outside[0][0].kept if self.outside else known

    def likely(self, number: int) -> list[float]:
        """Shares around the one that is likely to meet the bound, closer to it in every round; none where two masks do
        not tell.
        """
        between = bool(self.inside and self.outside)
        pair = [*self.inside[-1:], *self.outside[:1]] if between else [*self.inside[-2:], *self.outside[:2]]
        if len(pair) < 2:
            return []
        (less, ratio_of_less), (more, ratio_of_more) = ((1 - one.kept, max(ratio, LEAST_RATIO)) for one, ratio in pair)
        if not 0 < less < more or not ratio_of_less < ratio_of_more < MOST_RATIO / 100:
            return []
        power, apart = log(ratio_of_more / ratio_of_less) / log(more / less), BETWEEN ** (1 / number)
        if between:
            removed = less * ratio_of_less ** (-1 / power)
        else:
            at, ratio = (less, ratio_of_less) if self.outside else (more, ratio_of_more)
            removed = at * ratio ** (-1 / min(max(power, POWERS[0]), POWERS[1]))
            apart = min(max((removed / at) ** 0.5, (at / removed) ** 0.5, apart), BEYOND)
        return [1 - removed * factor for factor in (1 / apart, 1.0, apart)]


def close(keep: float) -> float:
    """How much more than `keep`, the smallest that did not fail, the largest that did may remove to end the walk."""
    return float(np.clip((1 - keep) * CLOSE, *CLOSE_BOUNDS))


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
    bracket = _Bracket((), ())
    for number in range(ROUNDS):
        keep, below = bracket.keep, bracket.failed(failed)
        if keep is not None and keep - max(below, least) <= close(keep):
            break
        # What the bounds allow at most is measured first: nothing that lies above it is in question.
        largest = [1.0] if number == 0 and most < 1 else []
        new: dict[float, Choice] = {}
        for wanted in _wanted(bracket, number, unit, max(below, least), keep or most):
            between = [share for share in wanted if least <= share < (keep or most)]
            choices = {kept_of(choice): choice for choice in map(choice_of, [*largest, *between][:AT_ONCE])}
            new = {kept: choice for kept, choice in choices.items() if below < kept < (keep or 1.0)}
            if len(new) > len(largest):
                break
        if not new:
            break
        found |= {one.kept: one for one in measure([*new.values()], number)}
        bracket = _Bracket.of([*found.values()], allowed)
        if bracket.keep is None and most < 1:
            break  # the largest that the bounds allow loses too much
    return tuple(sorted(found.values(), key=lambda one: one.kept)), bracket.keep, bracket.failed(failed)


def _wanted(bracket: _Bracket, number: int, unit: Unit, low: float, high: float) -> Iterator[Sequence[float]]:
    """Shares that a round may measure, those first that are likely to tell most."""
    if number == 0:
        # Of a small model with a large vocabulary more than all of FIRST stays whatever is cut.
        first = [share for share in FIRST[unit] if low <= share < high]
        more = np.linspace(low, min([*first, high]), AT_ONCE + 2 - len(first))[1:-1]
        yield [*first, *more[::-1].tolist()]
    elif number < ROUNDS - 1:
        yield bracket.likely(number)
    elif bracket.keep is None:  # any that holds is better than none
        yield [1 - (1 - low) / 2**halved for halved in range(1, AT_ONCE + 1)]
    yield np.linspace(low, high, AT_ONCE + 2)[1:-1].tolist()
