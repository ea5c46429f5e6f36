"""Temperature scaling of the probes (Guo et al. 2017), one log T per layer and regime.

The expected calibration error is cross-fitted: each text is judged with temperatures that were fitted on the other
folds. What is kept is fitted on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from sspcompile.prepare.toolkit import REGIMES

# Temperatures beyond this say that the optimum lies at infinity, not what the temperature is.
LOG_BOUND = float(np.log(20.0))
ECE_BINS = 15  # as in Guo et al. 2017
FOLDS = 3


@dataclass(frozen=True)
class RegimeFit:
    """log_temperature [L]; expected calibration error (mean over layers) without and with it, on the same texts but
    never on those that fitted it (None when there is one fold only); texts used."""

    log_temperature: np.ndarray
    ece_before: float
    ece_after: float | None
    texts: int


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over all entries, from logits (exact where a probability would round to 0 or 1)."""
    return float((np.logaddexp(0.0, logits) - targets * logits).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """log T that minimises the BCE of sigmoid(z / T), T in [1/20, 20]. The loss has one minimum in 1/T."""
    found = minimize_scalar(
        lambda log_t: binary_cross_entropy(logits * np.exp(-log_t), targets),
        bounds=(-LOG_BOUND, LOG_BOUND),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(found.x)


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = ECE_BINS) -> float:
    """Weighted mean of |mean probability - share of positives| over equal-width bins of binary decisions."""
    p, y = probabilities.ravel(), targets.ravel()
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=p, minlength=bins) - np.bincount(place, weights=y, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def fit_regime(logits: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> RegimeFit:
    """Temperatures for one regime from probe logits [N, L, K], targets [N, K] and fold numbers [N].

    Texts that share words (pairs of the same prompts, prompts of one pool) belong in one fold.
    """
    before = _mean_error(expit(logits), targets)
    fitted = _per_layer(logits, targets)
    if len(np.unique(folds)) < 2:
        return RegimeFit(fitted, before, None, len(logits))
    calibrated = np.empty(logits.shape)
    for fold in np.unique(folds):
        inside = folds == fold
        log_t = _per_layer(logits[~inside], targets[~inside])
        calibrated[inside] = expit(logits[inside] * np.exp(-log_t)[:, None])
    return RegimeFit(fitted, before, _mean_error(calibrated, targets), len(logits))


def _per_layer(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.array([fit_temperature(logits[:, layer], targets) for layer in range(logits.shape[1])])


def _mean_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Expected calibration error, mean over layers: [N, L, K] and [N, K]."""
    layers = range(probabilities.shape[1])
    return float(np.mean([expected_calibration_error(probabilities[:, layer], targets) for layer in layers]))


def folds_of(labels: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Fold numbers [N] at random, every label in all folds alike as far as it goes."""
    rng = np.random.default_rng(seed)
    found = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        found[rows] = np.arange(len(rows)) % folds
    return found


def log_temperatures(fits: dict[str, RegimeFit], layers: int) -> np.ndarray:
    """[L, 3], columns in the order of REGIMES. A regime without text stays at T = 1, and the toolkit says so."""
    return np.stack([fits[r].log_temperature if r in fits else np.zeros(layers) for r in REGIMES], axis=-1)


def cross_pairs(labels: np.ndarray, rows: np.ndarray, per_pair: int, seed: int) -> list[tuple[int, int]]:
    """For every pair of domains, up to `per_pair` pairs of rows, one of each domain, in random order of the two."""
    rng = np.random.default_rng(seed)
    pairs = []
    domains = np.unique(labels[rows])
    for place, first in enumerate(domains):
        for second in domains[place + 1 :]:
            left, right = (rng.permutation(rows[labels[rows] == k])[:per_pair] for k in (first, second))
            for a, b in zip(left.tolist(), right.tolist(), strict=False):
                pairs.append((a, b) if rng.random() < 0.5 else (b, a))
    return pairs
