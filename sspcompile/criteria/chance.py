"""Random heads, and random heads with the first layer kept: what every other score has to beat.

In small models most of the distance between criteria is whether the first layer survives, so the second is the baseline
that says something.
"""

from __future__ import annotations

import numpy as np

from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel


def random(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], uniform in [0, 1)."""
    units = Units.of(loaded.geometry, given.granularity)
    return np.random.default_rng(given.seed).random((units.layers, units.count))


def random_first_layer(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], see `first_layer_kept`."""
    units = Units.of(loaded.geometry, given.granularity)
    return first_layer_kept((units.layers, units.count), given.seed)


def first_layer_kept(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Uniform in [0, 1), the first layer one higher than all others."""
    scores = np.random.default_rng(seed).random(shape)
    scores[0] += 1.0
    return scores
