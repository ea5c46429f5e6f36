"""Temperature scaling of the probes (Guo et al. 2017), one log T per layer and regime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from sspcompile.prepare.toolkit import REGIMES

# Temperatures beyond this say that the optimum lies at infinity, not what the temperature is.
LOG_BOUND = float(np.log(20.0))
ECE_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class RegimeFit:
    """log_temperature [L]; expected calibration error (mean over layers) without and with it; texts used."""

    log_temperature: np.ndarray
    ece_before: float
    ece_after: float
    texts: int


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over all entries, from logits (exact where a probability would round to 0 or 1)."""
    return float((np.logaddexp(0.0, logits) - targets * logits).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """log T that minimises the BCE of sigmoid(z / T), T in [1/20, 20]. The loss has one minimum in 1/T."""
    found = minimize_scalar(
        lambda log_t: binary_cross_entropy(logits * np.exp(-log_t), targets),
        bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-4},
    )
    return float(found.x)


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = ECE_BINS) -> float:
    """Weighted mean of |mean probability - share of positives| over equal-width bins of binary decisions."""
    p, y = probabilities.ravel(), targets.ravel()
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=p, minlength=bins) - np.bincount(place, weights=y, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def fit_regime(logits: np.ndarray, targets: np.ndarray) -> RegimeFit:
    """Temperatures for one regime from probe logits [N, L, K] and targets [N, K]."""
    layers = range(logits.shape[1])
    log_t = np.array([fit_temperature(logits[:, layer], targets) for layer in layers])
    before = [expected_calibration_error(expit(logits[:, layer]), targets) for layer in layers]
    after = [
        expected_calibration_error(expit(logits[:, layer] * np.exp(-log_t[layer])), targets) for layer in layers
    ]
    return RegimeFit(log_t, float(np.mean(before)), float(np.mean(after)), len(logits))


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
