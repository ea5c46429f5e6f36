"""Importance prompt by prompt: how far the prompts of a domain differ, and what a scenario's own prompts say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sspcompile.criteria import measuring
from sspcompile.criteria.table import of_key
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import Sentence
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Steps, no_steps
from sspcompile.request.splits import thinned


def importance_per_prompt(
    loaded: LoadedModel,
    toolkit: Toolkit,
    name: str,
    texts: Sequence[Sentence],
    parts: np.ndarray,
    seed: int,
    progress: Steps = no_steps,
) -> np.ndarray:
    """Importance of every head for each of the continued texts, [N, L, H] float64.

    N is smaller than the number of texts where the criterion bounds its cost (they are then evenly spaced), and 1
    where it scores all of them together. Criteria with a value per axis are combined with `parts` [K]. Raises
    InputError for an unknown name, and where the toolkit lacks directions that it reads.
    """
    chosen, granularity = of_key(name)
    values = measuring.measure(
        loaded,
        chosen.name,
        thinned(texts, chosen.max_prompts or len(texts)),
        directions=toolkit.directions,
        seed=seed,
        granularity=granularity,
        every_prompt=True,
        progress=progress,
    ).values
    return values @ parts if chosen.per_axis else values


def relative_variance(values: np.ndarray) -> np.ndarray:
    """Variance over prompts of a head's share in the total, relative to the squared share: [N, L, H] -> [L, H].

    Of the ratio of means, by linearisation (Cochran 1977, "Sampling techniques", section 6.4): a prompt that is loud
    in all heads alike adds nothing. 0 where a head is zero everywhere, or for a single prompt.
    """
    total = values.sum((1, 2), keepdims=True)
    if len(values) < 2 or not total.sum() > 0:
        return np.zeros(values.shape[1:])
    share = values.mean(0) / total.mean()
    residual = (values - share * total) / total.mean()
    squared = (residual**2).sum(0) / (len(values) - 1)
    return np.divide(squared, share**2, out=np.zeros_like(share), where=share > 0)


def spread_by_domain(values: np.ndarray, labels: np.ndarray, domains: int) -> np.ndarray:
    """`relative_variance` over each domain's own prompts: [N, L, H] with labels [N] -> [L, H, K]."""
    return np.stack([relative_variance(values[labels == k]) for k in range(domains)], axis=-1)
