"""Run a criterion on texts of one or several domains: scores of query heads, per text or per domain."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sspcompile.criteria.table import Criterion, criterion
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.journal import Rows
from sspcompile.model.parallel import current, shared
from sspcompile.model.text import BATCH_TOKENS, GRADIENT_TOKENS, Sentence, batches_of
from sspcompile.progress import Steps, no_steps
from sspcompile.request.options import Granularity

PERCENT = 100
# Of a journal's interval: how long a per-prompt criterion may look at batches at a stretch.
STRETCH = 1 / 3


@dataclass(frozen=True)
class Scores:
    """Scores of query heads in rows: `values` [R, L, H], or [R, L, H, K] where every domain's axis gives its own.

    A row is a prompt, or all prompts of a domain together (`per`); `labels` [R] names its domain. `prompts`: how many
    texts were looked at.
    """

    values: np.ndarray
    labels: np.ndarray
    per: str
    prompts: int

    def by_domain(self, domains: int) -> np.ndarray:
        """Mean over each domain's own rows, [L, H, K]; where every axis has its value, domain k is read by axis k."""
        own = self.own_axis()
        return np.stack([own[self.labels == k].mean(0) for k in range(domains)], axis=-1)

    def own_axis(self) -> np.ndarray:
        """[R, L, H]: each row read by its own domain's axis."""
        if self.values.ndim == 3:
            return self.values
        return np.stack([self.values[row, ..., k] for row, k in enumerate(self.labels)])


def measure(
    loaded: LoadedModel,
    name: str,
    texts: Sequence[Sentence],
    *,
    labels: np.ndarray | None = None,
    directions: np.ndarray | None = None,
    seed: int = 0,
    granularity: Granularity = "head",
    every_prompt: bool = False,
    progress: Steps = no_steps,
) -> Scores:
    """Scores by the criterion `name` on texts with their continuations (see `prepare.text.continued`).

    `labels` [N] are the domains, counted from 0 (all 0 without them). A criterion that scores a set of prompts measures
    every domain by itself. `granularity` "group" scores whole key/value groups, each of whose heads gets an equal part.
    Expensive criteria look at `max_prompts` texts per domain, drawn with `seed`, unless `every_prompt`. `directions`
    [L, K, d]: unit probe directions for the subspace criteria.

    Raises InputError for an unknown criterion or granularity, and for missing directions.
    """
    chosen = criterion(name)
    units = Units.of(loaded.geometry, granularity)
    labels = np.zeros(len(texts), dtype=int) if labels is None else np.asarray(labels)
    rows = np.arange(len(labels)) if every_prompt else drawn_rows(labels, chosen.max_prompts, seed)
    reads = chosen.needs != "nothing"
    read = [texts[row] for row in rows.tolist()] if reads else []
    kept = journal.current().rows(name, loaded, [granularity, seed, labels[rows], read, directions])

    tokens = GRADIENT_TOKENS if "backward" in chosen.needs else BATCH_TOKENS

    def given(part: np.ndarray, report: Steps) -> CriterionInput:
        read = [texts[row] for row in part] if reads else []
        return CriterionInput(batches_of(loaded, read, tokens), len(read), directions, seed, granularity, report)

    # Rows of prompts are shared, and kept, by batch, sets of prompts as a whole.
    if chosen.per == "prompt":
        found, owners = _by_batch(loaded, chosen, given(rows, progress), kept), labels[rows]
    else:
        world = current()
        owners = np.unique(labels[rows])
        parts = [rows[labels[rows] == k] for k in owners]

        def look_at(i: int) -> np.ndarray:
            return chosen.measure(loaded, given(parts[i], _part(progress, i, len(parts))))

        own = {i: kept.of(i, partial(look_at, i)) for i in world.share(range(len(parts)))}
        measured = world.union(own)
        found = np.stack([measured[i] for i in range(len(parts))])
        progress(len(parts) * PERCENT, len(parts) * PERCENT)
    return Scores(units.spread(found, axis=2), owners, chosen.per, len(rows) if reads else 0)


def _by_batch(loaded: LoadedModel, chosen: Criterion, given: CriterionInput, kept: Rows) -> np.ndarray:
    """One row per prompt, [N, L, U] or [N, L, U, K]: those of the batches that `kept` has, and the others measured.

    A per-prompt criterion is a function of its batches, so it can be asked for some of them at a time.
    """
    keeper = journal.current()
    if not keeper.keeps:
        return shared(chosen.measure)(loaded, given)
    world = current()
    own = world.share(range(len(given.batches)))
    found = chosen.measure(loaded, replace(given, batches=()))  # zeros of the shape
    left = [number for number in own if number not in kept]
    for number in own:
        if number in kept:
            found[list(given.batches[number].rows)] = kept.take(number)
    at_once, steps = 1, 1  # of a batch
    if own and not left:
        given.report(len(own), len(own))
    while left:
        begun, before = time.monotonic(), len(own) - len(left)
        group = [given.batches[number] for number in left[:at_once]]

        def report(done: int, total: int, group: int = len(group), before: int = before) -> None:
            nonlocal steps
            steps = total // group
            if done < total:  # the end is told when it is kept
                given.report(before * steps + done, len(own) * steps)

        measured = chosen.measure(loaded, replace(given, batches=group, progress=report))
        for number, batch in zip(left, group, strict=False):
            found[list(batch.rows)] = measured[list(batch.rows)]
            kept.keep(number, measured[list(batch.rows)])
        left = left[len(group) :]
        given.report((len(own) - len(left)) * steps, len(own) * steps)
        each = (time.monotonic() - begun) / len(group)
        at_once = max(1, int(STRETCH * keeper.every / max(each, 1e-9)))
    return world.total(found)


def drawn_rows(labels: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """Ascending rows of the texts to look at, at most `most` of each domain."""
    rows = np.arange(len(labels))
    if most is None:
        return rows
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(rows[labels == k])[:most] for k in np.unique(labels)]))


def _part(progress: Steps, index: int, parts: int) -> Steps:
    """Progress of one of several equal parts, in percent of a part."""
    return lambda done, total: progress(index * PERCENT + PERCENT * done // total, parts * PERCENT)
