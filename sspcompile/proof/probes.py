"""Texts to try a model on that has none of its own."""

from __future__ import annotations

import numpy as np

LENGTHS = (1, 7, 32, 96)


def random_probes(vocab: int) -> list[list[int]]:
    """Token ids drawn evenly from a vocabulary of this size, one text for each of LENGTHS; the same every time."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in LENGTHS]
