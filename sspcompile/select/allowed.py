"""What a build may lose: bounds on the share of next tokens that change and on the perplexity of replies, and what
masks were measured to lose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from sspcompile.intervals import Estimate
from sspcompile.request.options import MOST_PERPLEXITY, Options

# The largest share that is typed, in steps of a thousandth: all tokens are no bound.
MOST_LOSS = 0.999


@dataclass(frozen=True)
class Rung:
    """A mask that was measured: what it keeps of the unit, the share of next tokens that changed hands, on the
    scenario's texts and on those of every protected domain, in their order, and the perplexity of the scenario's
    replies, times the dense model's.
    """

    kept: float
    loss: Estimate
    protected: tuple[Estimate, ...] = ()
    perplexity: Estimate | None = None


@dataclass(frozen=True)
class Allowed:
    """The share of next tokens that may change hands: on the scenario's texts (None: any), and by protected domain; and
    the perplexity that its replies may have, times the dense model's (None: any).

    A bound is for the upper end of the interval that the texts give: of masks that are searched for the smallest, the
    one that is taken owes a part of its figure to chance. A mask that changes nothing on the texts is within any bound,
    whatever so few can show: that is all that the dense model could show on them.
    """

    max_loss: float | None
    protect: Mapping[str, float] = field(default_factory=dict)
    max_perplexity: float | None = None

    @classmethod
    def by(cls, options: Options) -> Allowed:
        """What the options state."""
        return cls(options.max_loss, options.protect or {}, options.max_perplexity)

    @property
    def of_scenario(self) -> bool:
        """Whether a bound is about the scenario's own texts."""
        return self.max_loss is not None or self.max_perplexity is not None

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
        """What a mask loses, and the bound on it; of a perplexity both are what it is above the dense model's."""
        own = [] if self.max_loss is None else [(one.loss, self.max_loss)]
        if self.max_perplexity is not None and one.perplexity is not None:
            own.append((_above(one.perplexity), self.max_perplexity - 1))
        return [*own, *zip(one.protected, self.protect.values(), strict=True)]

    def __str__(self) -> str:
        """As what is said of a mask: `changes at most ...`."""
        of = [f"{100 * most:g} % of those of {name}" for name, most in self.protect.items()]
        tokens = [] if self.max_loss is None else [f"{100 * self.max_loss:g} % of the next tokens"]
        changes = " and ".join([*tokens, *of])
        if not tokens:
            changes = changes.replace("those", "the next tokens", 1)
        replies = (
            "" if self.max_perplexity is None else f"has replies at most {self.max_perplexity:g} times as perplexing"
        )
        return " and ".join(filter(None, (replies, changes and f"changes at most {changes}")))

    def told(self, one: Rung) -> str:
        """What a mask loses, in the order of `str`."""
        of = [f"{_percent(lost)} of those of {name}" for name, lost in zip(self.protect, one.protected, strict=True)]
        changes = " and ".join([*([] if self.max_loss is None else [_percent(one.loss)]), *of])
        replies = "" if self.max_perplexity is None or one.perplexity is None else f"has them {_times(one.perplexity)}"
        return " and ".join(filter(None, (replies, changes and f"changes {changes}")))

    def looser(self, one: Rung) -> Iterator[str]:
        """The options that would let a mask pass, for the bounds that it is above; none where one cannot be typed."""
        losses = [*one.protected, *([] if self.max_loss is None else [one.loss])]
        perplexity, most = one.perplexity, self.max_perplexity
        times = 1.0 if perplexity is None or most is None else perplexity.most
        if times > MOST_PERPLEXITY or any(lost.most > MOST_LOSS for lost in losses):
            return
        alone = not self.protect and (self.max_loss is None or most is None)
        if self.max_loss is not None and (_counted(one.loss) > self.max_loss or alone):
            yield f"--max-loss {_up(one.loss.most)}"
        if perplexity is not None and most is not None and (_counted(_above(perplexity)) > most - 1 or alone):
            yield f"--max-perplexity {_up(perplexity.most)}"
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


def _above(perplexity: Estimate) -> Estimate:
    """By how much a multiple is above 1, which is the dense model's."""
    low, high = (None if end is None else end - 1 for end in (perplexity.low, perplexity.high))
    return Estimate(perplexity.value - 1, low, high)


def _times(perplexity: Estimate) -> str:
    """As measured, and at most."""
    most = "" if perplexity.high is None else f" ({perplexity.high:.3f} at most)"
    return f"{perplexity.value:.3f} times{most}"


def _percent(loss: Estimate) -> str:
    """As measured, and at most."""
    return f"{100 * loss.value:.1f} %" + (f" ({100 * loss.high:.1f} % at most)" if loss.high is not None else "")


def _up(loss: float) -> str:
    """A share that is typed, no smaller than the one that was measured."""
    return f"{np.ceil(loss * 1000) / 1000:g}"
