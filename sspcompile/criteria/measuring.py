"""Run a criterion on texts of one or several domains: scores of query heads, per text or per domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.criteria.table import criterion
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.parallel import current, shared
from sspcompile.model.text import Sentence, batches_of
from sspcompile.progress import Steps, no_steps
from sspcompile.request.options import Granularity

PERCENT = 100


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

    def look_at(part: np.ndarray, report: Steps) -> np.ndarray:
        read = [texts[row] for row in part] if reads else []
        # Rows of prompts are shared by batch, sets of prompts as a whole.
        run = shared(chosen.measure) if chosen.per == "prompt" else chosen.measure
        return run(loaded, CriterionInput(batches_of(loaded, read), len(read), directions, seed, granularity, report))

    if chosen.per == "prompt":
        found, owners = look_at(rows, progress), labels[rows]
    else:
        world = current()
        owners = np.unique(labels[rows])
        parts = [rows[labels[rows] == k] for k in owners]
        own = {i: look_at(parts[i], _part(progress, i, len(parts))) for i in world.share(range(len(parts)))}
        measured = world.union(own)
        found = np.stack([measured[i] for i in range(len(parts))])
        progress(len(parts) * PERCENT, len(parts) * PERCENT)
    return Scores(units.spread(found, axis=2), owners, chosen.per, len(rows) if reads else 0)


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
