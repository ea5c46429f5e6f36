"""Heads that every domain needs: found by a test over prompts, not by a threshold on K domain means.

A test that finds *no difference* between domains confirms nothing, so the claim is turned round. For a head and a
domain, H0: "on this domain's prompts the head is worth no more than the median head". A head is on the list when H0
is rejected in *every* domain (intersection-union test: p = max over domains, valid without correction, Berger 1982),
false discoveries over all heads are held at 5 % (Benjamini-Hochberg), and its domain means vary little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, wilcoxon

FALSE_DISCOVERY = 0.05
MAX_SHARE = 0.2  # of all heads; the four shipped whitelists of the paper hold 11 to 19 %
MAX_SPREAD = 0.5  # coefficient of variation over domains up to which a head serves them alike
# Below this share of a prompt's median head, values count as equal: logarithms of noise would decide otherwise.
FLOOR_SHARE = 1e-3


@dataclass(frozen=True)
class Whitelist:
    """p [L, H]: p-value per head before false discovery control; chosen [L, H] bool; spread [L, H]: coefficient of
    variation of the head's share over domains."""

    p: np.ndarray
    chosen: np.ndarray
    spread: np.ndarray


def log_advantage(values: np.ndarray) -> np.ndarray:
    """log(head / median head of the same prompt), [N, L, H]; paired by prompt, so a loud prompt counts once."""
    median = np.median(values, axis=(1, 2), keepdims=True)
    positive = np.where(median > 0, median, values.mean((1, 2), keepdims=True))
    floor = np.where(positive > 0, positive, 1.0) * FLOOR_SHARE
    return np.log(values + floor) - np.log(median + floor)


def head_p_values(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """p-values [L, H] of the intersection-union test, from importance per prompt [N, L, H] and labels [N]."""
    advantage = log_advantage(values)
    per_domain = []
    for domain in np.unique(labels):
        rows = advantage[labels == domain]
        flat = rows.reshape(len(rows), -1)
        # A head that is the median head on every prompt has no signs to rank: nothing speaks against H0.
        informative = (flat != 0).any(0)
        p = np.ones(flat.shape[1])
        if informative.any():
            p[informative] = wilcoxon(
                flat[:, informative], alternative="greater", axis=0, zero_method="zsplit", method="approx"
            ).pvalue
        per_domain.append(p.reshape(values.shape[1:]))
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
    adjusted = false_discovery_control(p.ravel(), method="bh")
    eligible = (adjusted <= FALSE_DISCOVERY) & (spread <= MAX_SPREAD).ravel()
    weakest = share.min(-1).ravel()
    ranked = [i for i in np.argsort(-weakest, kind="stable") if eligible[i]]
    chosen = np.zeros(p.size, dtype=bool)
    chosen[ranked[: int(max_share * p.size)]] = True
    return Whitelist(p, chosen.reshape(p.shape), spread)
