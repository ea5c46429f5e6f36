"""Importance of every head for given text, by name: `IMPORTANCE` is the registry, all entries share one signature.

A criterion looks at batches of text (prompts with the dense model's own continuation) and gives one value per
prompt, layer and head; the mean over a domain's prompts is its importance I[l, h, k].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from sspcompile.errors import InputError
from sspcompile.loaded import LoadedModel
from sspcompile.prepare import causal, projection
from sspcompile.prepare.text import CONTINUATION_TOKENS, MAX_TOKENS, Batch, with_continuations
from sspcompile.prepare.toolkit import Toolkit

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Look:
    """What a criterion is given. `directions` [L, K, d]: unit probe directions, for the projections only."""

    batches: Sequence[Batch]
    prompts: int
    directions: np.ndarray | None = None
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class Criterion:
    """One kind of importance.

    `measure(loaded, look)` gives [N, L, H], or [N, L, H, K] where every domain's axis gives its own value
    (`per_axis`). `max_prompts` bounds the prompts per domain where the cost asks for it.
    """

    summary: str
    cost: str
    measure: Callable[[LoadedModel, Look], np.ndarray]
    per_axis: bool = False
    max_prompts: int | None = None


def _subspace(norm: str) -> Callable[[LoadedModel, Look], np.ndarray]:
    def measure(loaded: LoadedModel, look: Look) -> np.ndarray:
        if look.directions is None:
            raise InputError("The subspace criteria read probe directions.", hint="Give the toolkit.")
        return projection.subspace(loaded, look.batches, look.prompts, look.directions, norm, look.progress)

    return measure


def _fisher(targets: str, draws: int) -> Callable[[LoadedModel, Look], np.ndarray]:
    def measure(loaded: LoadedModel, look: Look) -> np.ndarray:
        return causal.fisher(loaded, look.batches, look.prompts, targets, draws, look.seed, look.progress)

    return measure


def _kl(loaded: LoadedModel, look: Look) -> np.ndarray:
    return causal.leave_one_out(loaded, look.batches, look.prompts, look.progress)


IMPORTANCE: Mapping[str, Criterion] = MappingProxyType({
    "fisher": Criterion(
        "squared gradient of the model's own next-token log-likelihood with respect to a gate on each head",
        "one forward pass and FISHER_DRAWS backward passes",
        _fisher("normal", causal.FISHER_DRAWS),
    ),
    "fisher-sampled": Criterion(
        "the same with targets sampled from the model's prediction: the textbook estimate, noisier",
        "one forward pass and FISHER_DRAWS backward passes",
        _fisher("sampled", causal.FISHER_DRAWS),
    ),
    "fisher-greedy": Criterion(
        "the same with the model's own most likely token as the only target: no randomness, but biased",
        "one forward and one backward pass",
        _fisher("greedy", 1),
    ),
    "kl": Criterion(
        "divergence of the next-token distribution when the head alone is closed",
        "half a forward pass per head of the model",
        _kl,
        max_prompts=32,
    ),
    "subspace": Criterion(
        "published: squared share of the head's write along the probe direction, norm in the hidden space",
        "one forward pass without gradients",
        _subspace("hidden"),
        per_axis=True,
    ),
    "subspace-probe": Criterion(
        "published, read the other way: the same with the norm inside the probes' K-dimensional space",
        "one forward pass without gradients",
        _subspace("probe"),
        per_axis=True,
    ),
})


def criterion(name: str) -> Criterion:
    """The registry entry. Raises InputError that lists the names."""
    if name not in IMPORTANCE:
        raise InputError(f"Unknown criterion {name!r}.", hint=f"Accepted: {', '.join(IMPORTANCE)}.")
    return IMPORTANCE[name]


def probe_directions(probe_weight: np.ndarray, feature_scale: np.ndarray) -> np.ndarray:
    """u[l, k]: the unit direction in the residual stream that layer l's probe reads for domain k, [L, K, d].

    A probe reads (f - mean) / scale, so its weight in the residual stream itself is weight / scale.
    """
    mapped = probe_weight.astype(np.float64) / feature_scale[:, None, :]
    return mapped / np.linalg.norm(mapped, axis=-1, keepdims=True).clip(min=1e-300)


def importance_of(
    loaded: LoadedModel,
    name: str,
    prompts: Sequence[str],
    *,
    toolkit: Toolkit | None = None,
    mixture: np.ndarray | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    progress: Progress | None = None,
) -> np.ndarray:
    """Importance of every head measured directly on these prompts, [L, H] float64: their mean, all of them used.

    The `subspace` criteria need `toolkit` for its probe directions; their per-domain values are combined with
    `mixture` [K] (equal parts without one). Raises InputError for an unknown name or a missing toolkit.
    """
    chosen = criterion(name)
    directions = None if toolkit is None else probe_directions(toolkit.probe_weight, toolkit.feature_scale)
    batches = with_continuations(loaded, prompts, continuation_tokens, max_tokens)
    values = chosen.measure(loaded, Look(batches, len(prompts), directions, seed, progress)).mean(0)
    if not chosen.per_axis:
        return values
    parts = np.full(values.shape[-1], 1.0 / values.shape[-1]) if mixture is None else np.asarray(mixture)
    return values @ parts


def by_domain(values: np.ndarray, labels: np.ndarray, domains: int) -> np.ndarray:
    """Mean over each domain's own prompts: [N, L, H] or [N, L, H, K] with labels [N] -> [L, H, K].

    Where every axis has its value, domain k is read by axis k on text of domain k.
    """
    own = own_axis(values, labels)
    return np.stack([own[labels == k].mean(0) for k in range(domains)], axis=-1)


def own_axis(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N, L, H, K] -> [N, L, H]: each prompt read by its own domain's axis. [N, L, H] stays as it is."""
    return values if values.ndim == 3 else np.stack([values[n, ..., k] for n, k in enumerate(labels)])
