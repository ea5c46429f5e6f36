"""Domain axes (DBS): one centred unit direction per domain in a shared space, and the choice of a good subset.

The shared space is the model's own: pooled residual features of the layers that recognition reads, each standardised
over the pool prompts, then averaged over layers. No second embedding model is needed, and no layer's scale dominates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sspcompile.errors import InputError

SPACE = "standardised pooled residual after attention, mean over the layers that are read"
# A standard deviation below this share of the layer's median one is a dead coordinate; dividing would blow up noise.
DEAD_SHARE = 1e-6


@dataclass(frozen=True)
class Selection:
    """A subset of domains. `orthogonality`: smallest pairwise 1 - cosine; `coverage`: mean share, in [0, 1], of the
    candidates' squared length that lies in the span of the chosen axes."""

    indices: tuple[int, ...]
    orthogonality: float
    coverage: float


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale per layer and coordinate, [N, L, d] -> two [L, d] float64; dead coordinates get scale 1."""
    mean = features.mean(0, dtype=np.float64)
    scale = features.std(0, dtype=np.float64)
    dead = scale <= DEAD_SHARE * np.median(scale, axis=-1, keepdims=True)
    return mean, np.where(dead | (scale == 0), 1.0, scale)


def domain_axes(features: np.ndarray, labels: np.ndarray, domains: int) -> np.ndarray:
    """[N, L, d] and [N] -> [K, d] float64: mean of each domain minus the mean over domains, at unit length.

    Raises InputError when a domain cannot be told from the average at all (its axis would have no direction).
    """
    mean, scale = standardisation(features)
    shared = np.zeros((len(features), features.shape[-1]))
    for layer in range(features.shape[1]):
        shared += (features[:, layer] - mean[layer]) / scale[layer]
    shared /= features.shape[1]
    centres = np.stack([shared[labels == k].mean(0) for k in range(domains)])
    centred = centres - centres.mean(0)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    if (length == 0).any():
        raise InputError(
            "The prompts of a domain coincide with the average of all domains.", hint="Give it prompts of its own."
        )
    return centred / length


def gram(axes: np.ndarray) -> np.ndarray:
    """Cosines between unit axes, [K, K]."""
    return axes @ axes.T


def _coverage(axes: np.ndarray, chosen: list[int]) -> float:
    basis = np.linalg.svd(axes[chosen], full_matrices=False)
    directions = basis.Vh[np.greater(basis.S, 1e-9 * basis.S.max())]
    return float(((axes @ directions.T) ** 2).sum(-1).mean())


def select(axes: np.ndarray, count: int) -> Selection:
    """The `count` of K axes that separate well and still cover the space, chosen greedily.

    Each step adds the axis with the largest sum of (a) its orthogonality to those chosen, 1 - max(cosine, 0), and
    (b) the coverage reached with it; the first step has (b) alone. Ties go to the earlier domain. The paper gives
    the two aims but no algorithm; with `count` >= K the subset is all of them.
    """
    cosines = gram(axes)
    chosen: list[int] = []
    candidates = list(range(len(axes)))
    if count >= len(axes):
        chosen = candidates
    while len(chosen) < min(count, len(axes)):

        def gain(k: int) -> float:
            apart = 1.0 - max(0.0, cosines[k, chosen].max()) if chosen else 0.0
            return apart + _coverage(axes, [*chosen, k])

        # Rounding keeps numerically equal gains equal, so that the tie rule and not the BLAS decides.
        chosen.append(max((k for k in candidates if k not in chosen), key=lambda k: (round(gain(k), 9), -k)))
    pairs = [cosines[a, b] for a in chosen for b in chosen if a != b]
    return Selection(tuple(sorted(chosen)), 1.0 - max(pairs, default=0.0), _coverage(axes, chosen))
