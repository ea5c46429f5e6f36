"""Head scores from two sources: the domains' cached importance as prior, and the scenario's own prompts as evidence.

Empirical Bayes, one posterior mean per head: the normal-normal shrinkage of James and Stein with unequal variances, the
prior's variance estimated from the sources at hand (Efron and Morris 1973, "Stein's estimation rule and its
competitors"; Morris 1983, "Parametric empirical Bayes inference"). Scores are not negative, heavy in the tail and
differ by factors, so heads are compared on the log scale, and as shares, because a loud scenario raises all heads
alike and changes no ranking:

    m_h   share of head h in the cached mixture
    r_h   its share in the mean over the n prompts; an arithmetic mean, since what removals cost adds up over prompts
    c_h   relative variance of one prompt's share: inside the domains of the mixture and between them
    v_h   = log(1 + c_h / n), variance of log r_h (that of a log-normal mean with this relative variance)
    t^2   between sources: the variance of log shares over the toolkit's domains, mean over heads
    w_h   = t^2 / (t^2 + v_h)
    log score_h = (1 - w_h) log m_h + w_h log r_h

No prompts give the cache, and with many of them v_h goes to 0 and the prompts have their way. c_h and t^2 come from the
domain pools and not from the scenario: a few values of so heavy a tail look alike until the rare large one is among
them, and a weight computed from their own spread trusts them most when they deserve it least (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Below this share of the mean head, values count as equal: logarithms of noise would decide otherwise.
FLOOR_SHARE = 1e-3


@dataclass(frozen=True)
class Shrunk:
    """`scores` [L, H] in the criterion's unit; `weight` [L, H] in [0, 1): how far the prompts had their way."""

    scores: np.ndarray
    weight: np.ndarray


def shrink(
    importance: np.ndarray, spread: np.ndarray, parts: np.ndarray, values: np.ndarray, *, prompts: int | None = None
) -> Shrunk:
    """Posterior mean of head scores.

    `importance` and `spread` [L, H, K] are the cached mean and relative variance per domain, `parts` [K] what each
    domain counts for (sums to 1), `values` [N, L, H] the importance per prompt of the scenario, or of `prompts` prompts
    together where N is 1. Without prompts, or when one source is zero everywhere, the other one is the answer.
    """
    cached = importance @ parts
    own = values.mean(0) if len(values) else np.zeros_like(cached)
    if not own.sum() > 0:
        return Shrunk(cached, np.zeros_like(cached))
    if not cached.sum() > 0:
        return Shrunk(own, np.ones_like(cached))
    floor = FLOOR_SHARE / cached.size
    domains = importance / np.maximum(importance.sum((0, 1)), np.finfo(np.float64).tiny) + floor
    prior, evidence = cached / cached.sum() + floor, own / own.sum() + floor
    # Law of total variance over the domains that the prompts come from.
    relative = ((spread + 1) * domains**2 @ parts - (domains @ parts) ** 2) / prior**2
    variance = np.log1p(np.maximum(relative, 0.0) / (prompts or len(values)))
    logs = np.log(domains)
    # Around the first domain: those that agree have no variance at all, however a machine rounds their mean.
    between = float((logs - logs[..., :1]).var(-1, ddof=1).mean())
    weight = between / np.maximum(between + variance, np.finfo(np.float64).tiny)
    shares = np.maximum(prior * (evidence / prior) ** weight - floor, 0.0)
    mean = weight.mean()
    return Shrunk(shares / shares.sum() * ((1 - mean) * cached.sum() + mean * own.sum()), weight)
