"""From what recognition says of single prompts to what a scenario is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.errors import RecipeError
from sspcompile.prepare.toolkit import Toolkit

# What a recipe says itself is never unknown.
NEVER = 1.0


@dataclass(frozen=True)
class Mixture:
    """`weights` [K] sums to 1; `breadth` in [0, 1] is its normalised entropy; `unknown` in [0, 1] is the share of no
    domain, for which all count alike. Of the domains' own held-out text one in ten has more than
    `unknown_line`."""

    domains: tuple[str, ...]
    weights: np.ndarray
    breadth: float
    unknown: float
    unknown_line: float = NEVER

    @property
    def parts(self) -> np.ndarray:
        """What every domain counts for in the end, [K], sums to 1: the unknown share is spread over all alike."""
        return (1 - self.unknown) * self.weights + self.unknown / len(self.weights)

    @property
    def is_unknown(self) -> bool:
        """Whether so much of the scenario fits no domain that its user has to know."""
        return self.unknown > self.unknown_line

    def as_mapping(self) -> dict[str, object]:
        return {
            "mixture": {name: round(float(w), 6) for name, w in zip(self.domains, self.weights, strict=True)},
            "breadth": round(self.breadth, 6),
            "unknown": round(self.unknown, 6),
            "unknown_line": round(self.unknown_line, 6),
            "fits_no_domain": self.is_unknown,
        }


def breadth_of(weights: np.ndarray) -> float:
    """c = H(q) / ln K of a distribution q [K] (method section 1.3)."""
    positive = weights[weights > 0]
    if len(weights) < 2:
        return 0.0
    return float(-(positive * np.log(positive)).sum() / np.log(len(weights)))


def mixture_of(toolkit: Toolkit, features: np.ndarray, *, calibrated: bool = True) -> Mixture:
    """Mixture of a scenario whose prompts have features [N, R, d] of the layers that the toolkit's recogniser reads;
    without calibration its temperature is 1.

    The mean over prompts is taken of probabilities, not of logits: it is the share of the prompts that belong to a
    domain, and one prompt that surely does not cannot veto the others. Where text of no domain taught nothing, no
    share is unknown.
    """
    count = len(toolkit.domains)
    mean = toolkit.learned.probabilities(features, calibrated=calibrated).mean(0)
    inside = mean[:count].sum()
    weights = mean[:count] / inside if inside > 0 else np.full(count, 1 / count)
    unknown = float(mean[count:].sum())
    return Mixture(toolkit.domains, weights, breadth_of(weights), unknown, float(toolkit.learned.unknown_line[0]))


def demand_known(domains: Collection[str], known: Sequence[str], *, source: str) -> None:
    """Raise RecipeError, about the recipe `source`, for domains that are none of the known ones."""
    if absent := sorted(set(domains) - set(known)):
        raise RecipeError(source, [f"unknown domain {name!r}; known: {', '.join(known)}" for name in absent])


def given_mixture(toolkit: Toolkit, domains: Mapping[str, float], *, source: str) -> Mixture:
    """Mixture that a recipe states itself. Raises RecipeError for domains which the toolkit does not know."""
    demand_known(domains, toolkit.domains, source=source)
    weights = np.array([domains.get(name, 0.0) for name in toolkit.domains], dtype=np.float64)
    weights /= weights.sum()
    return Mixture(toolkit.domains, weights, breadth_of(weights), 0.0)


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


def protecting(mixture: Mixture, protected: Mapping[str, Collection[str]], share: float) -> Mixture:
    """The mixture that scores heads where a `share` of what counts is for what is protected, the same for each: by name
    the domains that it stands for. What the mixture has no domain for is left out.
    """
    known = [[name in names for name in mixture.domains] for names in protected.values()]
    each = [np.array(one) / sum(one) for one in known if any(one)]
    if not each:
        return mixture
    return replace(mixture, weights=(1 - share) * mixture.parts + share * np.mean(each, axis=0), unknown=0.0)


def head_scores(toolkit: Toolkit, criterion: str, mixture: Mixture) -> np.ndarray:
    """Score[l, h] = (1 - u) sum_k s_k I[l, h, k] + u mean_k I[l, h, k], float64 [L, H]."""
    return toolkit.importance[criterion].astype(np.float64) @ mixture.parts
