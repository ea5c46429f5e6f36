"""The budget: what it may remove, from strength to a keep ratio, and from scores and whitelist to an order of merit."""

from __future__ import annotations

import numpy as np

from sspcompile.families import Geometry
from sspcompile.request.options import AUTO, Options

# At strength 1 the narrowest scenario keeps a quarter of the heads and the broadest three quarters; label-free
# scores with repair hold most of the quality of a narrow scenario down to a quarter.
NARROWEST_KEEP = 0.25
BROADEST_KEEP = 0.75
# Of any budget at most this share goes to heads that are kept whatever their score.
WHITELIST_SHARE = 0.25


def cuts_channels(options: Options, geometry: Geometry) -> bool:
    """Whether a build may remove channels of the MLPs beside heads: the budget counts parameters or loss, and one pass
    over texts scores both in one measure.
    """
    counted = options.size is not None or options.max_loss is not None
    scored = options.criterion == AUTO and options.importance_from != "domains"
    return (
        counted
        and scored
        and options.units == "all"
        and geometry.has_channels
        and not {"scenario", "mixing"} & {*options.without}
    )


def keep_from_strength(strength: float, breadth: float) -> float:
    """Keep ratio in (0, 1] for a strength in [0, 1] and a breadth in [0, 1].

    1 at strength 0; falls linearly in strength and rises linearly in breadth, so that more strength never keeps more
    and a narrower scenario never keeps more.
    """
    floor = NARROWEST_KEEP + (BROADEST_KEEP - NARROWEST_KEEP) * breadth
    return 1 - strength * (1 - floor)


def order_of_merit(scores: np.ndarray, whitelist: np.ndarray) -> np.ndarray:
    """Flat head indices [L * H], the most needed first. `scores` and `whitelist` are [L, H].

    Whitelisted heads are drawn forward, but in no prefix do they fill more than WHITELIST_SHARE by privilege alone.
    Equal scores are ordered by layer, then head, so that the order is the same every time.
    """
    flat, privileged = scores.ravel(), whitelist.ravel()
    by_score = np.argsort(-flat, kind="stable")
    waiting = [int(head) for head in by_score if privileged[head]]
    order: list[int] = []
    placed: set[int] = set()
    drawn = 0
    rest = iter(int(head) for head in by_score)
    while len(order) < flat.size:
        while waiting and waiting[0] in placed:
            waiting.pop(0)
        if waiting and drawn + 1 <= WHITELIST_SHARE * (len(order) + 1):
            head = waiting.pop(0)
            drawn += 1
        else:
            head = next(head for head in rest if head not in placed)
        placed.add(head)
        order.append(head)
    return np.array(order)


def merit(scores: np.ndarray, whitelist: np.ndarray) -> np.ndarray:
    """Scores [L, H] after the whitelist has had its say: the head at place n of the order of merit carries the n-th
    largest score. The scale and the sum of the scores stay; only their owners change."""
    order = order_of_merit(scores, whitelist)
    result = np.empty(scores.size, dtype=np.float64)
    result[order] = np.sort(scores.ravel())[::-1]
    return result.reshape(scores.shape)
