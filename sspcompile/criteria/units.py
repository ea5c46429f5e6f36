"""What a head score is given, and what it is a score of: query heads, or whole key/value groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from sspcompile.errors import InputError
from sspcompile.progress import Steps, no_steps

if TYPE_CHECKING:
    from torch import Tensor

    from sspcompile.families import Geometry
    from sspcompile.model.text import Batch

Granularity = Literal["head", "group"]


@dataclass(frozen=True)
class CriterionInput:
    """What a criterion is given: `prompts` texts, each with the dense model's own continuation, in padded `batches`.

    `directions` [L, K, d]: unit probe directions, for the subspace scores only. `seed` settles every random choice.
    """

    batches: Sequence[Batch]
    prompts: int
    directions: np.ndarray | None = None
    seed: int = 0
    granularity: Granularity = "head"
    progress: Steps = no_steps

    def report(self, done: int, total: int) -> None:
        self.progress(done, total)


@dataclass(frozen=True)
class Structures:
    """Scores of query heads [L, H] and of the channels of the MLPs [L, intermediate], float64, larger = more needed, in
    the unit of a method; None where layers choose between experts.
    """

    heads: np.ndarray
    channels: np.ndarray | None


@dataclass(frozen=True)
class Units:
    """What is kept or closed as a whole: `count` units per layer, of `size` query heads each, side by side."""

    layers: int
    count: int
    size: int

    @classmethod
    def of(cls, geometry: Geometry, granularity: Granularity) -> Units:
        """Raises InputError for an unknown granularity."""
        if granularity == "head":
            return cls(geometry.layers, geometry.heads, 1)
        if granularity == "group":
            return cls(geometry.layers, geometry.kv_heads, geometry.group_size)
        accepted = " or ".join(get_args(Granularity))
        raise InputError(f"Unknown granularity {granularity!r}.", hint=f"Accepted: {accepted}.")

    @property
    def total(self) -> int:
        return self.layers * self.count

    def sum(self, per_head: np.ndarray, axis: int = -1) -> np.ndarray:
        """Heads -> units along `axis`, for scores that add up."""
        heads = np.moveaxis(np.asarray(per_head), axis, -1)
        return np.moveaxis(heads.reshape(*heads.shape[:-1], self.count, self.size).sum(-1), -1, axis)

    def spread(self, per_unit: np.ndarray, axis: int = -1) -> np.ndarray:
        """Units -> heads along `axis`: every head of a unit gets an equal part of the unit's score."""
        return np.repeat(np.asarray(per_unit) / self.size, self.size, axis=axis)

    def gates(self, per_unit: Tensor) -> Tensor:
        """Gates of units [..., U] as gates of heads [..., H], see `hooks.head_gates`."""
        return per_unit.repeat_interleave(self.size, dim=-1)


def rising(costs: Sequence[float]) -> np.ndarray:
    """Costs in the order of removal as scores that keep this order: each at least as high as the one before it.

    A cost below an earlier one is lifted just above it (one part in a million, which float32 still tells apart).
    """
    scores = np.zeros(len(costs))
    reached = 0.0
    for place, cost in enumerate(costs):
        reached = max(float(cost), reached * (1 + 1e-6))
        scores[place] = reached
    return scores
