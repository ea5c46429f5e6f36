"""What a build may lose: bounds on the share of next tokens that change, and what masks were measured to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from sspcompile.intervals import Estimate
from sspcompile.request.options import Options


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
        return max(_counted(loss) - most for loss, most in self._pairs(one))

    def ratio(self, one: Rung) -> float:
        """What a mask loses as a multiple of its bound, the largest of these; 1 or less where all hold."""
        return max(_ratio(_counted(loss), most) for loss, most in self._pairs(one))

    def by_chance(self, one: Rung) -> bool:
        """Whether a mask is within the bounds by what was measured, and above one by its interval alone."""
        return self.excess(one) > 0 and all(loss.value <= most for loss, most in self._pairs(one))

    def _pairs(self, one: Rung) -> list[tuple[Estimate, float]]:
        """What a mask loses, and the bound on it."""
        own = [] if self.max_loss is None else [(one.loss, self.max_loss)]
        return [*own, *zip(one.protected, self.protect.values(), strict=True)]

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
        if self.max_loss is not None and (_counted(one.loss) > self.max_loss or not self.protect):
            yield f"--max-loss {_up(one.loss.most)}"
        for (name, most), lost in zip(self.protect.items(), one.protected, strict=True):
            if _counted(lost) > most:
                yield f"--protect {name}={_up(lost.most)}"


def _counted(loss: Estimate) -> float:
    """What counts of a loss: what it may be; nothing where nothing was lost."""
    return loss.most if loss.value != 0 else 0.0


def _ratio(loss: float, most: float) -> float:
    if most > 0:
        return loss / most
    return 0.0 if loss <= 0 else float("inf")


def _percent(loss: Estimate) -> str:
    """As measured, and at most."""
    return f"{100 * loss.value:.1f} %" + (f" ({100 * loss.high:.1f} % at most)" if loss.high is not None else "")


def _up(loss: float) -> str:
    """A share that is typed, no smaller than the one that was measured."""
    return f"{np.ceil(loss * 1000) / 1000:g}"
