"""What fits into a given memory, counted from weights and cache; activations and the runtime come on top."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """Of one contender in `memory` bytes: the longest `context` of one sequence, and how many sequences of `tokens`
    fit at once (`batch`). 0 where not even the weights do. `context` ends at the model's positions.
    """

    contender: str
    memory: int
    tokens: int
    context: int
    batch: int


def capacity(
    contender: str, *, memory: int, weight_bytes: float, kv_bytes_per_token: float, tokens: int, positions: int | None
) -> Capacity:
    """Sizes in bytes, `tokens` and `positions` per sequence."""
    free = max(0.0, memory - weight_bytes)
    fits = int(free // kv_bytes_per_token)
    context = fits if positions is None else min(fits, positions)
    return Capacity(contender, memory, tokens, context, fits // tokens)
