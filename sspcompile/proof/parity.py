"""How far a written model is from the masked model, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sspcompile.errors import ParityError

# Whoever meets a ParityError has done nothing wrong.
REPORT = "Please report this with the model's config.json and what `sspcompile doctor` prints."
PROBE_PROMPTS = 6
PROBE_TOKENS = 128
DTYPE = "float64"
# Both models compute the same sums, in another order because heads are missing. What that makes of the logits is the
# unit roundoff times a factor of the model's own: in float64 2^-53 / 2^-24 of what it is in fp32. A model whose fp32
# logits are nothing but rounding comes to this bound; any other stays far below it: SmolLM2-135M, whose cuts are up to
# 4e-5 of the scale apart in fp32, to 2e-13, and random models of every family to 1e-13.
BOUND = 2.0**-29


@dataclass(frozen=True)
class Parity:
    """`max_difference` over `logit_scale` (largest absolute logit of the masked model) is what `bound` bounds.

    Both are of logits computed in `dtype` at every token of `prompts` prompts and, unless `layerwise`, of what was
    generated behind them. `same_text`: both prefer the same next token everywhere. Tokens that the masked model itself
    scores alike up to the bound are no preference: which of them comes first is rounding alone.
    """

    max_difference: float
    logit_scale: float
    same_text: bool
    prompts: int
    layerwise: bool = False
    dtype: str = DTYPE
    bound: float = BOUND

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound and self.same_text


class Distance:
    """Collects logits of the masked model and of the written one until they are judged."""

    def __init__(self) -> None:
        self._difference = self._scale = self._preference = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Logits [S, V] twice: of the masked model and of the written one."""
        finite_logits(expected, found)
        self.add_values(float((expected - found).abs().max()), float(expected.abs().max()))
        chosen = expected.gather(-1, found.argmax(-1, keepdim=True))
        self.add_preference(expected.max(-1).values - chosen[..., 0])

    def add_values(self, difference: float, scale: float) -> None:
        """The largest difference and the largest logit of a part of the vocabulary."""
        self._difference, self._scale = max(self._difference, difference), max(self._scale, scale)

    def add_preference(self, margins: Tensor) -> None:
        """By how much the masked model prefers its own next token to the one of the written model, per position."""
        self._preference = max(self._preference, float(margins.max()))

    def parity(self, prompts: int, *, layerwise: bool) -> Parity:
        same = self._preference <= 2 * BOUND * self._scale
        return Parity(self._difference, self._scale, same, prompts, layerwise)


def finite_logits(*logits: Tensor) -> None:
    """Raise ParityError for logits that are not numbers."""
    if not all(torch.isfinite(one).all() for one in logits):
        raise ParityError("The model computes infinite or undefined logits.", hint="Check its weights.")


def demand(parity: Parity) -> None:
    """Raise ParityError unless the comparison holds."""
    if not parity.holds:
        text = "the same text" if parity.same_text else "another text"
        raise ParityError(
            f"The written model differs from the masked model by {parity.relative:.2e} of the logit scale in "
            f"{parity.dtype} and generates {text}; at most {parity.bound:.1e} and the same text are allowed.",
            hint=REPORT,
        )
