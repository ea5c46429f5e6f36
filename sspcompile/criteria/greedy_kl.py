"""Greedy backward elimination by divergence from the dense model: interactions between heads count.

Each step closes the unit whose closing raises KL(dense || closed) least, given those already closed. Measuring all
candidates in every step would take total^2 / 2 measurements. Accelerated greedy (Minoux, Accelerated greedy algorithms
for maximizing submodular set functions, 1978) needs far fewer: closing more usually makes closing dearer, so a
candidate's last measured cost is a lower bound. Candidates are measured anew from the lowest bound on, until the best
new cost is not above the next bound; at least FRESH per step, because units may also cover for one another, and at most
WINDOW, which bounds the whole.

Models with more than STEPS units close several per step. With no more than FRESH units this is exact backward
elimination; so it is up to WINDOW units where closing never becomes cheaper. Removing heads greedily by divergence is
this project's; leave-one-out ablation is Michel et al., arXiv 1905.10650, section 3, and its greedy use section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sspcompile.criteria.kl import Closing
from sspcompile.criteria.units import CriterionInput, Units, rising
from sspcompile.model.decoder import LoadedModel
from sspcompile.progress import Steps, no_steps

FRESH = 4
WINDOW = 16
STEPS = 256


def greedy(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """A unit's score is the rise of the divergence at its removal, in nats, never below that of an earlier one; [L, U].

    Their sum over what a mask closes is therefore about that mask's divergence.
    """
    units = Units.of(loaded.geometry, given.granularity)
    closing = Closing(loaded, given.batches, units)

    def cost(unit: int) -> float:
        return float(closing.without(*divmod(unit, units.count)).mean())

    def close(unit: int) -> None:
        closing.close(*divmod(unit, units.count))

    order, costs = eliminate(units.total, cost, close, progress=given.report)
    scores = np.empty(units.total)
    scores[order] = rising(costs)
    return scores.reshape(units.layers, units.count)


def eliminate(
    total: int,
    cost: Callable[[int], float],
    close: Callable[[int], None],
    *,
    fresh: int = FRESH,
    window: int = WINDOW,
    steps: int = STEPS,
    progress: Steps = no_steps,
) -> tuple[list[int], list[float]]:
    """Order of removal of `total` units, and the rise of the cost at each removal.

    `cost(u)` is the cost of everything closed so far and u; `close(u)` makes u part of that. Of equally cheap units
    the lowest goes first.
    """
    block = -(-total // steps)
    base = 0.0
    bound = np.array([cost(unit) for unit in range(total)])
    measured = dict(enumerate(bound.tolist()))  # the rises that hold for what is closed now
    order: list[int] = []
    costs: list[float] = []
    alive = list(range(total))
    while alive:
        for place, unit in enumerate(sorted(alive, key=lambda u: (bound[u], u))):
            best = sorted(measured.values())[:block]
            settled = place >= max(fresh, block) and best[-1] <= bound[unit]
            if settled or place >= max(window, 2 * block):
                break
            if unit not in measured:
                measured[unit] = cost(unit) - base
        bound[list(measured)] = list(measured.values())
        chosen = sorted(measured, key=lambda u: (measured[u], u))[:block]
        for unit in chosen:
            # Chosen together, but closed one by one, so that each has its own rise.
            after = base + measured[unit] if unit == chosen[0] else cost(unit)
            order.append(unit)
            costs.append(after - base)
            base = after
            alive.remove(unit)
            if alive:
                close(unit)
        measured = {}
        progress(len(order), total)
    return order, costs
