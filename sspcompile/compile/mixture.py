"""From the probes' probabilities to what a scenario is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sspcompile.errors import RecipeError
from sspcompile.prepare.toolkit import Toolkit

# A sigmoid above one half says "this text is of domain k"; temperatures keep the side of a logit, so the regime
# follows from uncalibrated and calibrated probabilities alike.
FIRES = 0.5


@dataclass(frozen=True)
class Mixture:
    """`weights` [K] sums to 1; `breadth` in [0, 1] is its normalised entropy; `unknown` in [0, 1] is the share for
    which no domain answers, scored with the domain-free average."""

    domains: tuple[str, ...]
    weights: np.ndarray
    breadth: float
    unknown: float
    regime: str

    def as_mapping(self) -> dict[str, object]:
        return {
            "mixture": {name: round(float(w), 6) for name, w in zip(self.domains, self.weights, strict=True)},
            "breadth": round(self.breadth, 6),
            "unknown": round(self.unknown, 6),
            "regime": self.regime,
        }


def breadth_of(weights: np.ndarray) -> float:
    """c = H(q) / ln K of a distribution q [K] (method section 1.3)."""
    positive = weights[weights > 0]
    if len(weights) < 2:
        return 0.0
    return float(-(positive * np.log(positive)).sum() / np.log(len(weights)))


def mixture_of(toolkit: Toolkit, probabilities: Mapping[str, np.ndarray]) -> Mixture:
    """Mixture from calibrated probabilities p [L, K] per regime.

    q_k is the layer-weighted mean of p[l, k], normalised; the unknown share is prod_k (1 - q_k), the chance that none
    of the K independent sigmoids fires.
    """
    weight = toolkit.layer_weight[:, None]
    fired = int(((probabilities["single"] * weight).sum(0) > FIRES).sum())
    regime = "single" if fired == 1 else "cross" if fired > 1 else "outside"
    mean = (probabilities[regime] * weight).sum(0).astype(np.float64)
    unknown = float(np.prod(1 - mean))
    total = mean.sum()
    weights = mean / total if total > 0 else np.full(len(mean), 1 / len(mean))
    return Mixture(toolkit.domains, weights, breadth_of(weights), unknown, regime)


def given_mixture(toolkit: Toolkit, domains: Mapping[str, float], *, source: str) -> Mixture:
    """Mixture that a recipe states itself. Raises RecipeError for domains which the toolkit does not know."""
    if absent := sorted(set(domains) - set(toolkit.domains)):
        raise RecipeError(source, [f"unknown domain {name!r}; known: {', '.join(toolkit.domains)}" for name in absent])
    weights = np.array([domains.get(name, 0.0) for name in toolkit.domains], dtype=np.float64)
    weights /= weights.sum()
    return Mixture(toolkit.domains, weights, breadth_of(weights), 0.0, "given")


def head_scores(toolkit: Toolkit, criterion: str, mixture: Mixture) -> np.ndarray:
    """Score[l, h] = (1 - u) sum_k s_k I[l, h, k] + u mean_k I[l, h, k], float64 [L, H]."""
    importance = toolkit.importance[criterion].astype(np.float64)
    own = importance @ mixture.weights
    return (1 - mixture.unknown) * own + mixture.unknown * importance.mean(-1)
