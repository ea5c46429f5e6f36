"""What a decoded token takes in time: a table of layers that were timed in other shapes, and the straight lines through
it.

    step + vocabulary + sum over the layers of (layer + groups * (group + heads of a group * head) + width * channel)

`step` is what every token takes whatever the layers are, `vocabulary` what a head over all tokens adds to one over few.
Layers that differ in more than what a cut changes (a sliding window, experts) are of another `kind`, with prices of its
own. The prices are fitted by least squares on relative errors, and none is below 0: a part that takes no time that
could be measured has no price.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from sspcompile.errors import ArtifactError
from sspcompile.families import Geometry
from sspcompile.slicing.measures import SECOND, Measure, Serving
from sspcompile.slicing.plan import SlicePlan

# Beside those of every kind: a step, and the vocabulary.
COMMON, OF_KIND = 2, 4


@dataclass(frozen=True)
class Conditions:
    """What the times hold for: `runtime` is torch (transformers), `versions` are those of its packages, `device` cpu,
    cuda or mps, `processor` what it calls itself. `serving`: what is in the cache.
    """

    runtime: str
    versions: Mapping[str, str]
    device: str
    processor: str
    dtype: str
    threads: int
    serving: Serving


@dataclass(frozen=True)
class Timed:
    """A model that was timed: `layers` layers of one `kind` with `groups` groups of `each` query heads and MLPs of
    `width` channels; `vocabulary`: whether its head is over all tokens. `rounds`: the seconds of a step in each.
    """

    kind: int
    layers: int
    groups: int
    each: int
    width: int
    vocabulary: bool
    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)


@dataclass(frozen=True)
class Prices:
    """Seconds that a `layer` of one kind takes in any shape, and what every `group`, query `head` and `channel` of it
    adds.
    """

    layer: float
    group: float
    head: float
    channel: float


@dataclass(frozen=True)
class LatencyTable:
    """What was timed, and what it comes to. `kinds`: the kind of every layer of the model; `prices` by kind. `step` and
    `vocabulary` in seconds. `worst`: the largest relative error of the fit, of any row.
    """

    conditions: Conditions
    kinds: tuple[int, ...]
    rows: tuple[Timed, ...]
    step: float
    vocabulary: float
    prices: tuple[Prices, ...]
    worst: float

    def foretold(self, row: Timed) -> float:
        """Seconds that the fit gives a row."""
        one = self.prices[row.kind]
        layer = one.layer + row.groups * (one.group + row.each * one.head) + row.width * one.channel
        return self.step + row.vocabulary * self.vocabulary + row.layers * layer


def table_of(conditions: Conditions, kinds: Sequence[int], rows: Sequence[Timed]) -> LatencyTable:
    """The table of these rows, fitted. Every kind of layer needs a row at least."""
    counts = np.array([_counts(row, max(kinds) + 1) for row in rows])
    seconds = np.array([row.seconds for row in rows])
    relative = counts / seconds[:, None]
    fitted = _fit(relative, _identified(rows, max(kinds) + 1))
    prices = tuple(Prices(*map(float, fitted[at : at + OF_KIND])) for at in range(COMMON, len(fitted), OF_KIND))
    worst = float(np.abs(relative @ fitted - 1).max())
    return LatencyTable(conditions, tuple(kinds), tuple(rows), float(fitted[0]), float(fitted[1]), prices, worst)


def _counts(row: Timed, kinds: int) -> list[int]:
    """How often a row pays each of the prices: a step, the vocabulary, and by kind those of `Prices`."""
    found = [1, int(row.vocabulary), *[0] * (OF_KIND * kinds)]
    at = COMMON + OF_KIND * row.kind
    found[at : at + OF_KIND] = [row.layers * n for n in (1, row.groups, row.groups * row.each, row.width)]
    return found


def _identified(rows: Sequence[Timed], kinds: int) -> list[int]:
    """The prices that the rows tell apart; what is the same in all of them is a part of the layer's price."""
    found = [0] if any(len({row.layers for row in rows if row.kind == kind}) > 1 for kind in range(kinds)) else []
    found += [1] if len({row.vocabulary for row in rows}) > 1 else []
    for kind in range(kinds):
        shapes = {(row.groups, row.each, row.width) for row in rows if row.kind == kind}
        varied = [len(set(values)) > 1 for values in zip(*shapes, strict=True)]
        found += [COMMON + OF_KIND * kind + place for place, told in enumerate((True, *varied)) if told]
    return found


def _fit(relative: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Prices [columns of `relative`] that bring every row near 1, none below 0: the one furthest below is left out
    until there is none.
    """
    left, found = [*columns], np.zeros(relative.shape[1])
    while left:
        prices = np.linalg.lstsq(relative[:, left], np.ones(len(relative)), rcond=None)[0]
        # What a price explains of all rows, so that prices of large and small numbers compare.
        share = prices * relative[:, left].mean(axis=0)
        if share.min() >= 0:
            found[left] = prices
            break
        del left[int(share.argmin())]
    return found


def latency_of(g: Geometry, table: LatencyTable) -> Measure:
    """Picoseconds of a decoded token, by the table. A unit that may go counts one at least, so that less is always
    counted as less.
    """
    prices = [table.prices[kind] for kind in table.kinds]
    head = tuple(_picoseconds(one.head) if g.group_size > 1 else 0 for one in prices)
    group = tuple(_picoseconds(one.group) for one in prices)
    channel = tuple(_picoseconds(one.channel) if g.has_channels else 0 for one in prices)
    # What a layer takes in any shape is not told apart by its parts: it stays with the MLP.
    attention = tuple(g.kv_heads * (group[at] + g.group_size * head[at]) for at in range(g.layers))
    layer = tuple(_picoseconds(one.layer) + attention[at] + g.width * channel[at] for at, one in enumerate(prices))
    whole = _picoseconds(table.step) + _picoseconds(table.vocabulary) + sum(layer)
    return Measure("latency", whole, head, group, channel, layer, attention, serving=table.conditions.serving)


def _picoseconds(seconds: float) -> int:
    return max(1, round(seconds * SECOND))


def seconds_of(plan: SlicePlan, table: LatencyTable) -> tuple[float, float]:
    """Seconds of a decoded token by the table, (dense, sliced)."""
    measure = latency_of(plan.geometry, table)
    shapes = [layer.shape for layer in plan.layers]
    return measure.whole / SECOND, measure.kept(plan.geometry, shapes, plan.widths) / SECOND


def latency_json(plan: SlicePlan, table: LatencyTable | None) -> dict[str, Any]:
    """What plan.json says of the time of a decoded token, beside `plan_json`; nothing where none was bounded."""
    if table is None:
        return {}
    dense, sliced = seconds_of(plan, table)
    return {"latency": {"dense": dense, "sliced": sliced, "table": asdict(table)}}


_TABLE = TypeAdapter(LatencyTable)


def dump_table(table: LatencyTable) -> str:
    """The table as text: a line for each row that was timed."""
    lines = []
    for key, value in asdict(table).items():
        rows = ",\n    ".join(map(json.dumps, value)) if key == "rows" else ""
        lines.append(f'  "{key}": [\n    {rows}\n  ]' if rows else f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_table(path: Path) -> LatencyTable:
    """Open a table. Raises ArtifactError for a file that does not hold one."""
    try:
        return _TABLE.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise ArtifactError(
            f"{path} does not hold a table of latencies.", hint="Remove it; the next run measures it again."
        ) from error
