"""The texts that a build looks at: which ones choose and repair, and which ones only judge.

A text is never in both. The scenario's own prompts come first; where they are few, pool prompts fill up in the
proportion of the mixture, and the counts say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.compile.mixture import Mixture
from sspcompile.domains import DomainPool

FIT_PROMPTS = 96
HELD_PROMPTS = 32
# Of the scenario's own prompts no more than this are used; more would cost time and change little.
OWN_FIT_PROMPTS = 256
OWN_HELD_PROMPTS = 96
# Every fourth text is held out, in pools and in the user's own prompts alike.
HOLD_EVERY = 4


@dataclass(frozen=True)
class Evidence:
    """`fit` chooses and repairs, `held` judges; `own_fit` and `own_held` of them are the scenario's own prompts."""

    fit: tuple[str, ...]
    held: tuple[str, ...]
    own_fit: int
    own_held: int


def split(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fit, held out); text number 3, 7, 11, ... is held out, so that a sorted file is split evenly."""
    held = tuple(text for index, text in enumerate(texts) if index % HOLD_EVERY == HOLD_EVERY - 1)
    return tuple(text for index, text in enumerate(texts) if index % HOLD_EVERY != HOLD_EVERY - 1), held


def fit_part(pools: Sequence[DomainPool]) -> tuple[DomainPool, ...]:
    """The pools without their held-out prompts: what `prepare` may learn from."""
    return tuple(replace(pool, prompts=split(pool.prompts)[0]) for pool in pools)


def gather(prompts: Sequence[str], mixture: Mixture, pools: Sequence[DomainPool], seed: int) -> Evidence:
    """Evidence for a scenario with these prompts of its own (none for a sentence or a given mixture)."""
    own_fit, own_held = split(tuple(dict.fromkeys(prompts)))
    own_fit, own_held = _thinned(own_fit, OWN_FIT_PROMPTS), _thinned(own_held, OWN_HELD_PROMPTS)
    own = set(prompts)
    weights = (1 - mixture.unknown) * mixture.weights + mixture.unknown / len(mixture.weights)
    rng = np.random.default_rng(seed)

    def fill(part: int, have: int, wanted: int) -> tuple[str, ...]:
        drawn: list[str] = []
        for share, pool in zip(whole_shares(weights, wanted - have), pools, strict=True):
            texts = [text for text in split(pool.prompts)[part] if text not in own]
            drawn += [texts[index] for index in np.sort(rng.permutation(len(texts))[:share])]
        return tuple(drawn)

    return Evidence(
        fit=own_fit + fill(0, len(own_fit), FIT_PROMPTS),
        held=own_held + fill(1, len(own_held), HELD_PROMPTS),
        own_fit=len(own_fit),
        own_held=len(own_held),
    )


def _thinned(texts: tuple[str, ...], limit: int) -> tuple[str, ...]:
    """At most `limit` of the texts, evenly spaced."""
    if len(texts) <= limit:
        return texts
    return tuple(texts[index * len(texts) // limit] for index in range(limit))


def whole_shares(weights: np.ndarray, count: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `count` (largest remainders), zeros when it is negative."""
    if count <= 0:
        return [0] * len(weights)
    exact = weights / weights.sum() * count
    shares = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - shares), kind="stable")[: count - shares.sum()]:
        shares[index] += 1
    return [int(share) for share in shares]
