"""Random heads, and random heads with the first layer kept: what every other score has to beat.

In small models most of the distance between criteria is whether the first layer survives, so the second is the baseline
that says something.
"""

from __future__ import annotations

import numpy as np

from sspcompile.criteria.look import Look, Units
from sspcompile.model.decoder import LoadedModel


def random(loaded: LoadedModel, look: Look) -> np.ndarray:
    """[L, U], uniform in [0, 1)."""
    units = Units.of(loaded.geometry, look.granularity)
    return np.random.default_rng(look.seed).random((units.layers, units.count))


def random_first_layer(loaded: LoadedModel, look: Look) -> np.ndarray:
    """[L, U], see `first_layer_kept`."""
    units = Units.of(loaded.geometry, look.granularity)
    return first_layer_kept((units.layers, units.count), look.seed)


def first_layer_kept(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Uniform in [0, 1), the first layer one higher than all others."""
    scores = np.random.default_rng(seed).random(shape)
    scores[0] += 1.0
    return scores
