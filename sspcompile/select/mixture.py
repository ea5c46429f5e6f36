"""From the probes' probabilities to what a scenario is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from sspcompile.errors import RecipeError
from sspcompile.prepare.probes import logits
from sspcompile.prepare.toolkit import REGIMES, Toolkit

# A sigmoid above one half says "this text is of domain k". Temperatures keep the side of a logit, so the regime of a
# text can be read before it is calibrated.
FIRES = 0.5
# From this share on the user is told. On SmolLM2-135M, prompts of its domains that others wrote have 0.33 to 0.45 in
# the mean, those of another subject 0.68 (benchmarks/recognition.py).
MUCH_UNKNOWN = 0.45


@dataclass(frozen=True)
class Mixture:
    """`weights` [K] sums to 1; `breadth` in [0, 1] is its normalised entropy; `unknown` in [0, 1] is the share for
    which no domain answers, scored with the domain-free average."""

    domains: tuple[str, ...]
    weights: np.ndarray
    breadth: float
    unknown: float
    regimes: Mapping[str, int]

    @property
    def parts(self) -> np.ndarray:
        """What every domain counts for in the end, [K], sums to 1: the unknown share is spread over all alike."""
        return (1 - self.unknown) * self.weights + self.unknown / len(self.weights)

    @property
    def is_unknown(self) -> bool:
        """Whether so much of the scenario fits no domain that its user has to know."""
        return self.unknown >= MUCH_UNKNOWN

    def as_mapping(self) -> dict[str, object]:
        return {
            "mixture": {name: round(float(w), 6) for name, w in zip(self.domains, self.weights, strict=True)},
            "breadth": round(self.breadth, 6),
            "unknown": round(self.unknown, 6),
            "fits_no_domain": self.is_unknown,
            "regimes": dict(self.regimes),
        }


def breadth_of(weights: np.ndarray) -> float:
    """c = H(q) / ln K of a distribution q [K] (method section 1.3)."""
    positive = weights[weights > 0]
    if len(weights) < 2:
        return 0.0
    return float(-(positive * np.log(positive)).sum() / np.log(len(weights)))


def mixture_of(toolkit: Toolkit, features: np.ndarray, *, calibrated: bool = True) -> Mixture:
    """Mixture of a scenario whose prompts have features [N, L, d]; without calibration every temperature is 1.

    Each prompt has a regime of its own (one domain fires, several, none), whose temperature calibrates it. q_k is the
    mean over prompts of the layer-weighted probability, normalised; a prompt's unknown share is prod_k (1 - p_k), the
    chance that none of the K independent sigmoids fires.
    """
    z = logits(features, toolkit.feature_mean, toolkit.feature_scale, toolkit.probe_weight, toolkit.probe_bias)
    fired = (_over_layers(toolkit, expit(z)) > FIRES).sum(-1)
    regime = np.select([fired == 1, fired > 1], [REGIMES.index("single"), REGIMES.index("cross")], 2)
    temperature = np.exp(toolkit.log_temperature.T[regime] * calibrated)  # [N, L]
    p = _over_layers(toolkit, expit(z / temperature[..., None]))
    q = p.mean(0)
    weights = q / q.sum() if q.sum() > 0 else np.full(len(q), 1 / len(q))
    counts = {name: int((regime == index).sum()) for index, name in enumerate(REGIMES)}
    return Mixture(toolkit.domains, weights, breadth_of(weights), float(np.prod(1 - p, axis=-1).mean()), counts)


def _over_layers(toolkit: Toolkit, p: np.ndarray) -> np.ndarray:
    """[N, L, K] -> [N, K], float64."""
    return np.einsum("nlk,l->nk", p.astype(np.float64), toolkit.layer_weight)


def given_mixture(toolkit: Toolkit, domains: Mapping[str, float], *, source: str) -> Mixture:
    """Mixture that a recipe states itself. Raises RecipeError for domains which the toolkit does not know."""
    if absent := sorted(set(domains) - set(toolkit.domains)):
        raise RecipeError(source, [f"unknown domain {name!r}; known: {', '.join(toolkit.domains)}" for name in absent])
    weights = np.array([domains.get(name, 0.0) for name in toolkit.domains], dtype=np.float64)
    weights /= weights.sum()
    return Mixture(toolkit.domains, weights, breadth_of(weights), 0.0, {})


def ablated(mixture: Mixture, without: Collection[str]) -> Mixture:
    """The mixture that scores heads when parts of the method are off.

    Without `mixing` the top domain counts alone; without `scenario` all domains count alike, and that goes first.
    """
    count = len(mixture.weights)
    if "scenario" in without:
        return replace(mixture, weights=np.full(count, 1 / count), unknown=0.0)
    if "mixing" in without:
        return replace(mixture, weights=np.eye(count)[mixture.weights.argmax()], unknown=0.0)
    return mixture


def head_scores(toolkit: Toolkit, criterion: str, mixture: Mixture) -> np.ndarray:
    """Score[l, h] = (1 - u) sum_k s_k I[l, h, k] + u mean_k I[l, h, k], float64 [L, H]."""
    return toolkit.importance[criterion].astype(np.float64) @ mixture.parts
