"""The uniform mask is chosen by measuring: several head scores, every shape, each repaired, compared by cross-fitting.

A uniform cut takes the same share from every layer, from those that bear it and from those that do not. What remains
depends on the repair more than on the score, and no score ranks heads best under every budget: on the embedded model
those that look at one layer by itself (`greedy-output`, `probe-pruning`, `wanda`) are ahead at half the heads and
below, the eliminating one above. Each of these costs a forward pass over the texts that fit the repair. Nestedness is
not lost: uniform masks are not nested in the budget anyway (compile/layouts.py).

Masks are compared on the texts that fit the repair, each text under a repair that has not seen it; the guard texts
stay fresh for the layout. The measure is the mean of sqrt(KL): up to a constant it bounds the total variation between
the two predictions (Pinsker), so a text that is lost anyway does not outvote those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.compile.budget import merit
from sspcompile.compile.layouts import Choice, Shape, uniform_choices
from sspcompile.criteria.look import Granularity
from sspcompile.criteria.measuring import measure
from sspcompile.pipeline.compiling import Ranking
from sspcompile.pipeline.judging import Judge, divergence_of, logits_at
from sspcompile.prepare.text import Batch, batches_of

FOLDS = 4
CONTENDERS = ("greedy-output", "probe-pruning", "wanda")


@dataclass(frozen=True)
class Tried:
    """One mask of the shortlist: the mean over texts of the root of the KL from the dense model (nats per token)."""

    criterion: str
    shape: Shape
    distance: float


@dataclass(frozen=True)
class Shortlisted:
    """The winner and everything that was tried, best first."""

    ranking: Ranking
    choice: Choice
    tried: tuple[Tried, ...]


class Folds:
    """The texts that fit the repair, in FOLDS parts; each part is measured under a repair that the others fit."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        texts = judge.sentences
        count = min(FOLDS, len(texts)) if judge.repair != "none" else 1
        self._parts: list[tuple[list[Batch], list[Batch]]] = []
        for fold in range(count):
            held = [text for number, text in enumerate(texts) if number % count == fold]
            fit = [text for number, text in enumerate(texts) if number % count != fold]
            self._parts.append((batches_of(judge.loaded, fit), batches_of(judge.loaded, held)))
        self._dense = [[logits_at(judge.loaded, batch) for batch in held] for _, held in self._parts]

    def distances(self, masks: Sequence[np.ndarray]) -> list[float]:
        """Mean over texts of sqrt(KL) of each mask (bool [layers, heads]), repaired."""
        roots: list[list[float]] = [[] for _ in masks]
        for part, ((fit, held), dense) in enumerate(zip(self._parts, self._dense, strict=True)):
            self._judge.progress("comparing uniform masks", part, len(self._parts))
            for mine, kept, repair in zip(roots, masks, self._judge.fitted(masks, fit), strict=True):
                found = divergence_of(self._judge.loaded, kept, repair, held, dense)
                mine += np.sqrt(np.maximum(found.kl_per_prompt, 0.0)).tolist()
        self._judge.progress("comparing uniform masks", len(self._parts), len(self._parts))
        return [float(np.mean(mine)) for mine in roots]


def contenders(judge: Judge, own: Ranking, granularity: Granularity = "head") -> tuple[Ranking, ...]:
    """The scenario's own ranking, and one by each of CONTENDERS from the texts that fit the repair."""
    found = [own]
    for name in CONTENDERS:
        scores = measure(judge.loaded, name, judge.sentences, seed=judge.seed, granularity=granularity)
        found.append(Ranking(name, scores.by_domain(1)[..., 0]))
    return tuple(found)


def best_uniform(
    judge: Judge, ranked: Sequence[Ranking], whitelist: np.ndarray, keep: float, *, groups_only: bool = False,
    holds: Callable[[Choice], bool] = lambda _: True,
) -> Shortlisted | None:
    """The uniform mask within `keep` that diverges least once repaired; ties go to the earlier one.

    `whitelist` is bool [layers, heads]. `holds` says whether a class can hold a mask; None when it holds none.
    """
    kv_heads = judge.loaded.geometry.kv_heads
    masks: dict[bytes, tuple[Ranking, Choice]] = {}
    for ranking in ranked:
        for choice in uniform_choices(merit(ranking.values, whitelist), kv_heads, keep, groups_only=groups_only):
            if holds(choice):
                masks.setdefault(choice.kept.tobytes(), (ranking, choice))
    if not masks:
        return None
    distances = Folds(judge).distances([choice.kept for _, choice in masks.values()])
    found = [
        (distance, number, ranking, choice)
        for number, (distance, (ranking, choice)) in enumerate(zip(distances, masks.values(), strict=True))
    ]
    found.sort(key=lambda one: one[:2])
    tried = tuple(Tried(ranking.name, choice.shapes[0], value) for value, _, ranking, choice in found)
    return Shortlisted(found[0][2], found[0][3], tried)
