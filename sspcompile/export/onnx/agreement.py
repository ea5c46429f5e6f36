"""How an export compares with the model that it was made from, and what must hold of that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """What must hold of an export: `bound` on the difference of logits in shares of their scale, the same text."""

    bound: float
    same_text: bool


@dataclass(frozen=True)
class Agreement:
    """Of the graph in ONNX Runtime with the model in transformers, fp32, over all probes.

    `max_difference` is that of logits at real tokens and decoding steps, `logit_scale` their largest absolute value.
    Of `texts`, `padded` were padded on the left, each in a batch with a longer one. `same_text`: every greedy
    continuation of `new_tokens` tokens is the same. `mean_kl` (nats per token) and `top1_agreement` are those of the
    next token.
    """

    max_difference: float
    logit_scale: float
    same_text: bool
    texts: int
    padded: int
    new_tokens: int
    mean_kl: float
    top1_agreement: float

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference
