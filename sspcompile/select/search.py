"""The default's masks are chosen by measuring: several head scores, each repaired, compared by cross-fitting.

No score ranks heads best in every model and under every budget. `fisher-midway` sees heads whose work is saturated,
`fisher-rounds` leaves the dense model's own neighbourhood less; which of them is ahead differs by model. A uniform cut
takes the same share from every layer, from those that bear it and from those that do not: what remains depends on the
repair more than on the score, so every shape is tried, and scores that look at one layer by itself (`greedy-output`,
`probe-pruning`, `wanda`) take part. The two Fisher scores cost a few backward passes over the texts that fit the
repair, the others a forward pass each. The price is that masks of two budgets may come from different scores, and then
one is not part of the other.

Masks are compared on the texts that fit the repair, each text under a repair that has not seen it; the guard texts
stay fresh for the layout. The measure is the mean of sqrt(KL): up to a constant it bounds the total variation between
the two predictions (Pinsker), so a text that is lost anyway does not outvote those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sspcompile.criteria.measuring import measure
from sspcompile.model import journal
from sspcompile.model.text import Batch, batches_of
from sspcompile.progress import stage_of
from sspcompile.request.options import Granularity
from sspcompile.select.budget import merit
from sspcompile.select.judging import Judge, divergence_of, logits_at
from sspcompile.select.reading import Ranking
from sspcompile.slicing.layouts import Choice, Shape, choose, uniform_choices
from sspcompile.slicing.mask import Layout

FOLDS = 4
MEASURED_SCORES = ("fisher-midway",)
WITHIN_LAYERS = ("greedy-output", "probe-pruning", "wanda")
"""Scores that compare the heads of one layer; they know nothing of what a layer is worth."""


@dataclass(frozen=True)
class Tried:
    """One mask that was measured: the mean over texts of the root of the KL from the dense model (nats per token).

    `shape` is None where it differs by layer.
    """

    criterion: str
    shape: Shape | None
    distance: float


@dataclass(frozen=True)
class Searched:
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
        report = stage_of(self._judge.progress, "comparing masks")
        for part in range(len(self._parts)):
            for done, (mine, found) in enumerate(zip(roots, self._roots(part, masks), strict=True), 1):
                mine += found.tolist()
                report(part * len(masks) + done, len(self._parts) * len(masks))
        return [float(np.mean(mine)) for mine in roots]

    def _roots(self, part: int, masks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """sqrt(KL) of each mask on the texts of a part, [texts]; what an interrupted run measured is not fitted."""
        judge, (fit, held) = self._judge, self._parts[part]
        measured = journal.current().rows(
            "masks", judge.loaded, [fit, held, list(masks), judge.repair, str(judge.dtype)]
        )
        left = [kept for number, kept in enumerate(masks) if number not in measured]
        fitting = stage_of(judge.progress, f"repair (part {part + 1} of {len(self._parts)})")
        repairs = iter(judge.fitted(left, fit, fitting))

        def measure_root(kept: np.ndarray) -> np.ndarray:
            found = divergence_of(judge.loaded, kept, next(repairs), held, self._dense[part])
            return np.sqrt(np.maximum(found.kl_per_prompt, 0.0))

        for number, kept in enumerate(masks):
            yield measured.of(number, partial(measure_root, kept))


def rankings(
    judge: Judge, own: Ranking, layouts: Iterable[Layout], granularity: Granularity = "head"
) -> tuple[Ranking, ...]:
    """The scenario's own ranking, and one by each score that `layouts` call for from the texts that fit the repair."""
    names = (*MEASURED_SCORES, *WITHIN_LAYERS) if "uniform" in layouts else MEASURED_SCORES
    found = [own]
    for name in names:
        report = stage_of(judge.progress, f"{name} on the scenario's texts")
        scores = measure(judge.loaded, name, judge.sentences, seed=judge.seed, granularity=granularity, progress=report)
        found.append(Ranking(name, scores.by_domain(1)[..., 0]))
    return tuple(found)


def best_mask(
    judge: Judge,
    ranked: Sequence[Ranking],
    layout: Layout,
    whitelist: np.ndarray,
    keep: float,
    *,
    groups_only: bool = False,
    holds: Callable[[Choice], bool] = lambda _: True,
) -> Searched | None:
    """The mask of a layout within `keep` that diverges least once repaired; ties go to the earlier one.

    `whitelist` is bool [layers, heads]. `holds` says whether a class can hold a mask; None when it holds none.
    """
    kv_heads = judge.loaded.geometry.kv_heads
    masks: dict[bytes, tuple[Ranking, Choice]] = {}
    for ranking in ranked:
        if layout == "per-layer" and ranking.name in WITHIN_LAYERS:
            continue
        values = merit(ranking.values, whitelist)
        if layout == "uniform":
            choices = uniform_choices(values, kv_heads, keep, groups_only=groups_only)
        else:
            choices = (choose(values, kv_heads, keep, layout, groups_only=groups_only),)
        for choice in choices:
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
    tried = tuple(
        Tried(ranking.name, choice.shapes[0] if layout == "uniform" else None, value)
        for value, _, ranking, choice in found
    )
    return Searched(found[0][2], found[0][3], tried)
