"""The default's masks are chosen by measuring: several shapes and rankings, each repaired, compared on other texts.

A uniform cut takes the same share from every layer, from those that bear it and from those that do not, so every shape
is tried; where the pools' scores are mixed for the scenario, they are tried beside `obs` on its texts. Masks of two
budgets may then come from different scores, and one is not part of the other.

Masks are compared on a part of the texts that may fit the repair, each under a repair that another part fits; the guard
texts stay fresh for the layout. The measure is the mean of sqrt(KL): up to a constant it bounds the total variation
between the two predictions (Pinsker), so a text that is lost anyway does not outvote those that are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.model.text import Sentence, batches_of
from sspcompile.progress import stage_of
from sspcompile.repair.repair import Repair
from sspcompile.request.splits import thinned
from sspcompile.select.budget import merit
from sspcompile.select.judging import HeldOut, Judge
from sspcompile.select.scoring import Ranking
from sspcompile.slicing.layouts import Choice, Shape, choose, uniform_choices
from sspcompile.slicing.mask import Layout

# Of the texts that may fit the repair; a third at most is held out to compare on.
COMPARED_FIT, COMPARED_HELD = 32, 24
HOLD_EVERY = 3


@dataclass(frozen=True)
class Tried:
    """One mask that was measured: the mean over texts of the root of the KL from the dense model (nats per token).

    `shape` is None where it differs by layer, and where whole layers are compared.
    """

    criterion: str
    shape: Shape | None
    distance: float


@dataclass(frozen=True)
class Searched:
    """The winner of a layout, the repair that it was compared with, and everything that was tried, best first (nothing
    where there was one mask only)."""

    ranking: Ranking
    choice: Choice
    repair: Repair | None
    tried: tuple[Tried, ...]


Masks = Sequence[tuple[Ranking, Choice]]


def masks_of(
    ranked: Sequence[Ranking],
    layout: Layout,
    whitelist: np.ndarray,
    keep: float,
    kv_heads: int,
    *,
    groups_only: bool = False,
    holds: Callable[[Choice], bool] = lambda _: True,
) -> Masks:
    """The different masks of a layout within `keep` that the rankings call for, of every shape where it is uniform.

    `whitelist` is bool [layers, heads]. `holds` says whether a class can hold a mask.
    """
    masks: dict[bytes, tuple[Ranking, Choice]] = {}
    for ranking in ranked:
        values = merit(ranking.values, whitelist)
        if layout == "uniform":
            choices = uniform_choices(values, kv_heads, keep, groups_only=groups_only)
        else:
            choices = (choose(values, kv_heads, keep, layout, groups_only=groups_only),)
        for choice in choices:
            if holds(choice):
                masks.setdefault(choice.units.key, (ranking, choice))
    return tuple(masks.values())


def best_of(judge: Judge, masks: Mapping[Layout, Masks]) -> dict[Layout, Searched]:
    """The mask of every layout that diverges least once repaired; ties go to the earlier one.

    All are repaired together: a half of what that costs are passes of the dense model, the same for all.
    """
    fit, held = comparison_parts(judge)
    listed = [(layout, ranking, choice) for layout, some in masks.items() for ranking, choice in some]
    compared = HeldOut(judge.loaded, held, judge.seed) if any(len(some) > 1 for some in masks.values()) else None
    fitted = judge.fitted(
        [choice.units for *_, choice in listed],
        batches_of(judge.loaded, fit),
        stage_of(judge.progress, "repair (masks to compare)"),
    )
    best: dict[Layout, tuple[float, Ranking, Choice, Repair | None]] = {}
    tried: dict[Layout, list[Tried]] = {layout: [] for layout in masks}
    report = stage_of(judge.progress, "comparing masks")
    for number, ((layout, ranking, choice), repair) in enumerate(zip(listed, fitted, strict=True)):
        distance = 0.0
        if compared is not None and len(masks[layout]) > 1:
            distance = _distance(compared, choice, repair)
            shape = choice.shapes[0] if layout == "uniform" and choice.layers is None else None
            tried[layout].append(Tried(ranking.name, shape, distance))
        if layout not in best or distance < best[layout][0]:
            best[layout] = distance, ranking, choice, repair
        report(number + 1, len(listed))
    return {
        layout: Searched(ranking, choice, repair, tuple(sorted(tried[layout], key=lambda one: one.distance)))
        for layout, (_, ranking, choice, repair) in best.items()
    }


def _distance(compared: HeldOut, choice: Choice, repair: Repair | None) -> float:
    found = compared.divergence(choice.units, repair)
    return float(np.sqrt(np.maximum(found.kl_per_prompt, 0.0)).mean())


def comparison_parts(judge: Judge) -> tuple[Sequence[Sentence], Sequence[Sentence]]:
    """The texts that fit the repairs of the comparison, and those that compare; without repairs, all may compare.

    A conversation is on one side, unless the scenario's own are so few or so unequal that one side would have next to
    nothing of them: then their texts are on both.
    """
    texts = judge.sentences
    if judge.repair == "none":
        return (), thinned(texts, COMPARED_HELD)
    splits = judge.splits
    compares = comparing(splits.owners(splits.fit), splits.own_fit)
    parts: tuple[list[Sentence], list[Sentence]] = ([], [])
    for text, held in zip(texts, compares, strict=True):
        parts[held].append(text)
    return thinned(parts[False], COMPARED_FIT), thinned(parts[True], COMPARED_HELD)


def comparing(owners: Sequence[int], own: int) -> list[bool]:
    """Which texts compare and do not repair, by the conversation of each; the first `own` are the scenario's."""
    found = _dealt(owners)
    # Half of the share that is due, and no more than half of all.
    if own and not max(1, own // (2 * HOLD_EVERY)) <= sum(found[:own]) <= own // 2:
        return _dealt(range(len(owners)))
    return found


def _dealt(owners: Sequence[int]) -> list[bool]:
    """Which texts compare, by the conversation of each: every fourth conversation, where they are equally long, and no
    more than a fourth of the texts up to any conversation.
    """
    sizes, seen, held = Counter(owners), 0, 0
    compares: dict[int, bool] = {}
    for number, count in sizes.items():
        seen += count
        compares[number] = HOLD_EVERY * (held + count) <= seen
        held += count * compares[number]
    return [compares[number] for number in owners]
