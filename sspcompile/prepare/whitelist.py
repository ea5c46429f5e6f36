"""Heads that every domain needs: found by a test over prompts, not by a threshold on K domain means.

A test that finds *no difference* between domains confirms nothing, so the claim is turned round. For a head and a
domain, H0: "on a prompt of this domain the head is worth more than the median head in at most half of the cases".

* *Sign test*, paired by prompt: under H0 the number of wins is at most Binomial(n, 1/2), whatever the distribution of
  importance is. If heads are exchangeable H0 is true, since each is above the median of all at most half of the time. A
  signed-rank test would also need symmetry of the differences, and importance is skewed even on the log scale: there it
  rejects for heads that are alike. Prompts count as independent draws from their domain.
* A head is on the list when H0 is rejected in *every* domain: intersection-union, p = max over domains, valid without
  correction (Berger 1982).
* False discoveries over all heads are held at 5 % by Benjamini and Yekutieli (2001). All heads of a prompt are compared
  with the same median, so that one above it pushes others below: the dependence is not the positive one that the
  Benjamini-Hochberg procedure needs.

Of what is found, heads stay whose shares vary little over domains, the largest weakest share first, up to a fifth of
all heads. This picks by size of effect, and false discoveries are small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, false_discovery_control

FALSE_DISCOVERY = 0.05
MAX_SHARE = 0.2  # of all heads; the four shipped whitelists of the paper hold 11 to 19 %
MAX_SPREAD = 0.5  # coefficient of variation over domains up to which a head serves them alike
# A lead over the median head below this share of it, or of the mean head where the median is 0, is no win: it is noise.
LEAD = 1e-3


@dataclass(frozen=True)
class Whitelist:
    """p [L, H]: p-value per head before false discovery control; chosen [L, H] bool; spread [L, H]: coefficient of
    variation of the head's share over domains."""

    p: np.ndarray
    chosen: np.ndarray
    spread: np.ndarray


def wins(values: np.ndarray) -> np.ndarray:
    """Bool [N, L, H]: on which prompts a head is worth more than the median head of the same prompt."""
    median, mean = np.median(values, axis=(1, 2), keepdims=True), values.mean((1, 2), keepdims=True)
    return values > np.maximum(median * (1 + LEAD), mean * LEAD)


def head_p_values(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """p-values [L, H] of the intersection-union test, from importance per prompt [N, L, H] and labels [N]."""
    won = wins(values)
    per_domain = [
        binom.sf(won[labels == domain].sum(0) - 1, int((labels == domain).sum()), 0.5) for domain in np.unique(labels)
    ]
    return np.max(per_domain, axis=0)


def shares(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean share of each head in a prompt's total importance, per domain: [N, L, H] -> [L, H, K]."""
    total = values.sum((1, 2), keepdims=True)
    relative = values / np.where(total > 0, total, 1.0)
    return np.stack([relative[labels == domain].mean(0) for domain in np.unique(labels)], axis=-1)


def whitelist(values: np.ndarray, labels: np.ndarray, max_share: float = MAX_SHARE) -> Whitelist:
    """The heads confirmed in all domains, at most `max_share` of all heads (rounded down), best minimum first."""
    p = head_p_values(values, labels)
    share = shares(values, labels)
    mean = share.mean(-1)
    spread = np.where(mean > 0, share.std(-1) / np.where(mean > 0, mean, 1.0), np.inf)
    adjusted = false_discovery_control(p.ravel(), method="by")
    eligible = (adjusted <= FALSE_DISCOVERY) & (spread <= MAX_SPREAD).ravel()
    weakest = share.min(-1).ravel()
    ranked = [i for i in np.argsort(-weakest, kind="stable") if eligible[i]]
    chosen = np.zeros(p.size, dtype=bool)
    chosen[ranked[: int(max_share * p.size)]] = True
    return Whitelist(p, chosen.reshape(p.shape), spread)
