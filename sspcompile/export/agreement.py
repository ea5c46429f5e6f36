"""How an export compares with the model that it was made from, and what must hold of that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """What an export of a quiet model keeps to: `bound` on the difference of logits in shares of their scale, the same
    text.

    One that does not is wrong, or its model loses more to rounding: then the model's own rounding decides (check.py).
    """

    bound: float
    same_text: bool


@dataclass(frozen=True)
class Agreement:
    """Of the graph in ONNX Runtime with the model in transformers, fp32, over all probes.

    `max_difference` is that of logits at real tokens and decoding steps, `logit_scale` their largest absolute value.
    Of `texts`, `padded` were padded on the left, each in a batch with a longer one. `same_text`: every greedy
    continuation of `new_tokens` tokens is the same. `mean_kl` (nats per token) and `top1_agreement` are those of the
    next token. `rounding`: where it had to decide, how far transformers in the numbers of the graph is from float64, in
    shares of the scale.
    """

    max_difference: float
    logit_scale: float
    same_text: bool
    texts: int
    padded: int
    new_tokens: int
    mean_kl: float
    top1_agreement: float
    rounding: float | None = None

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference

    def meets(self, gate: Gate) -> bool:
        """Whether nothing has to be asked about rounding."""
        return self.relative <= gate.bound and (self.same_text or not gate.same_text)
