"""Temperature scaling (Guo et al. 2017) of class probabilities, and how far they are from what happens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

# Temperatures beyond this say that the optimum lies at infinity, not what the temperature is.
LOG_BOUND = float(np.log(20.0))
ECE_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Temperature:
    """log T, and the mean weighted cross entropy (nats) that it leaves on the texts which fitted it."""

    log: float
    loss: float


def cross_entropy(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean over texts, nats: logits [N, C], classes [N], weights [N]."""
    own = log_softmax(logits, axis=1)[np.arange(len(classes)), classes]
    return float(-(weights * own).sum() / weights.sum())


def fit_temperature(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> Temperature:
    """T in [1/20, 20] that minimises the cross entropy of softmax(z / T). The loss has one minimum in 1/T."""
    found = minimize_scalar(
        lambda log_t: cross_entropy(logits * np.exp(-log_t), classes, weights),
        bounds=(-LOG_BOUND, LOG_BOUND),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return Temperature(float(found.x), float(found.fun))


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = ECE_BINS) -> float:
    """Weighted mean of |mean probability - share of positives| over equal-width bins of binary decisions."""
    p, y = probabilities.ravel(), targets.ravel()
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=p, minlength=bins) - np.bincount(place, weights=y, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def cross_fitted(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Probabilities [N, C], each text's at a temperature that the other folds fitted."""
    found = np.empty(logits.shape)
    for fold in np.unique(folds):
        own = folds == fold
        log_t = fit_temperature(logits[~own], classes[~own], weights[~own]).log
        found[own] = softmax(logits[own] * np.exp(-log_t), axis=1)
    return found


def folds_of(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold numbers [N] at random, every label in all folds alike as far as it goes."""
    rng = np.random.default_rng(seed)
    found = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        found[rows] = np.arange(len(rows)) % folds
    return found
