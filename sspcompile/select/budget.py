"""The budget: what it may remove and how much of it, and from scores and whitelist to an order of merit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import InputError
from sspcompile.families import Geometry, positions_of
from sspcompile.request.options import AUTO, DEFAULT_BATCH, DEFAULT_CONTEXT, Options, Whole
from sspcompile.slicing.depth import shallowest
from sspcompile.slicing.latency import LatencyTable, latency_of
from sspcompile.slicing.layouts import Choice, smallest_keep
from sspcompile.slicing.measures import (
    NANOSECOND,
    Bound,
    Measure,
    Serving,
    Unit,
    at_most,
    memory_of,
    parameters_of,
    shared,
)
from sspcompile.slicing.sizes import smallest_share

# At strength 1 the narrowest scenario keeps a quarter of the heads and the broadest three quarters; label-free
# scores with repair hold most of the quality of a narrow scenario down to a quarter.
NARROWEST_KEEP = 0.25
BROADEST_KEEP = 0.75
# Of any budget at most this share goes to heads that are kept whatever their score.
WHITELIST_SHARE = 0.25


@dataclass(frozen=True)
class Budget:
    """What a mask may keep: what all the `bounds` allow, or where there are none the share `keep` of the heads.

    In its unit it can be made smaller: heads, or what the tightest bound counts.
    """

    keep: float = 1.0
    bounds: tuple[Bound, ...] = ()

    @property
    def measure(self) -> Measure | None:
        """What the tightest bound counts; None where heads are counted."""
        return min(self.bounds, key=lambda bound: bound.share).measure if self.bounds else None

    @property
    def unit(self) -> Unit:
        return self.measure.unit if self.measure is not None else "heads"

    @property
    def size(self) -> float | None:
        """The share of all parameters that it allows; None where it bounds something else."""
        return min((bound.share for bound in self.bounds if bound.measure.unit == "parameters"), default=None)

    @property
    def option(self) -> str:
        """The option that asks for it, as it is typed; of several bounds the first."""
        return str(self.bounds[0]) if self.bounds else f"--keep {self.keep:g}"

    @property
    def serving(self) -> Serving | None:
        """What a bound on memory or time counts it for."""
        return next((bound.measure.serving for bound in self.bounds if bound.measure.serving is not None), None)

    def at(self, share: float) -> Budget:
        """This budget with no more than a share of its unit."""
        if self.measure is None:
            return Budget(min(share, self.keep))
        return Budget(bounds=(*self.bounds, shared(self.measure, share, FLAGS[self.unit])))

    def freed(self) -> Budget:
        """In the same unit, everything."""
        if self.measure is None:
            return Budget()
        return Budget(bounds=(everything(self.measure),))

    def share(self, choice: Choice, g: Geometry) -> float:
        """What a mask keeps of the unit."""
        if self.measure is None:
            return choice.ratio
        return self.measure.kept(g, choice.shapes, choice.widths) / self.measure.whole

    def least(self, g: Geometry, *, channels: bool, groups_only: bool, whole: Whole | None = None) -> float:
        """The smallest share of the unit that any mask keeps; `whole`: of those that remove such units alone."""
        if self.measure is not None and whole is not None:
            return shallowest(self.measure, whole) / self.measure.whole
        if self.measure is None:
            return smallest_keep(g.heads, g.kv_heads, groups_only=groups_only)
        return smallest_share(self.measure, g, channels=channels, groups_only=groups_only)


FLAGS: Mapping[Unit, str] = {
    "heads": "--keep",
    "parameters": "--size",
    "memory": "--max-memory",
    "latency": "--max-latency",
}


def everything(measure: Measure) -> Bound:
    """The bound that allows the whole model."""
    return Bound(measure, measure.whole + measure.added, 1.0, FLAGS[measure.unit])


def bounded(options: Options) -> bool:
    """Whether options state bounds on parameters, memory or time."""
    stated = (options.size, options.max_params, options.max_memory, options.max_latency)
    return any(one is not None for one in stated)


def refuse_several(options: Options) -> None:
    """Raise InputError where several sizes are asked for at once and one is wanted."""
    if options.shares:
        raise InputError(
            f"--nested {options.nested} asks for several sizes at once, which only `build` makes.",
            hint="Give one of them, as --size 0.8; what building all will cost, `plan --cost` says.",
        )


def bounds_of(options: Options, checkpoint: Checkpoint, table: LatencyTable | None = None) -> tuple[Bound, ...]:
    """The bounds that options state on parameters, memory and time, as whole numbers; a host that was wished for counts
    with what it adds. `table` says what time parts of the model take here.

    Raises what opening the headers of the checkpoint raises, and InputError for a bound on time without a table.
    """
    found = counted_bounds(options, checkpoint)
    if options.max_latency is None:
        return found
    if table is None:
        raise InputError("--max-latency counts by a table, and none was measured.", hint="Measure it: `table_for`.")
    latency = latency_of(checkpoint.geometry, table)
    return (*found, at_most(latency, options.max_latency * NANOSECOND, FLAGS["latency"]))


def counted_bounds(options: Options, checkpoint: Checkpoint) -> tuple[Bound, ...]:
    """As `bounds_of`, those that follow from the headers: on parameters and memory."""
    if not bounded(options):
        return ()
    host = options.wanted_host
    parameters = parameters_of(checkpoint.geometry, checkpoint.expected(), host)
    found = []
    if options.size is not None:
        found.append(shared(parameters, options.size, "--size"))
    if options.max_params is not None:
        found.append(at_most(parameters, options.max_params, "--max-params"))
    if options.max_memory is not None:
        memory = memory_of(checkpoint, serving_of(options, checkpoint.config), host)
        found.append(at_most(memory, options.max_memory, "--max-memory"))
    return tuple(found)


def serving_of(options: Options, config: Mapping[str, Any]) -> Serving:
    """What memory and time are counted for: what the options say, or DEFAULT_CONTEXT tokens of one sequence, as far as
    the model's positions go.
    """
    longest = min(positions_of(config) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    return Serving(options.context or longest, options.batch or DEFAULT_BATCH)


def budget_of(options: Options, g: Geometry, bounds: tuple[Bound, ...], breadth: float) -> Budget:
    """What a build may keep before anything is measured: what the `bounds` of the options allow; where they bound the
    loss alone, everything, counted in parameters where channels of the MLPs or whole units may go and in heads
    otherwise.
    """
    if bounds:
        return Budget(bounds=bounds)
    if options.floored and (cuts_channels(options, g) or options.whole is not None):
        return Budget(bounds=(everything(parameters_of(g, host=options.wanted_host)),))
    if options.keep is not None:
        return Budget(options.keep)
    return Budget(1.0 if options.strength is None else keep_from_strength(options.strength, breadth))


def cuts_channels(options: Options, geometry: Geometry) -> bool:
    """Whether a build may remove channels of the MLPs beside heads: the budget counts parameters, memory, time or loss,
    and one pass over texts scores both in one measure.
    """
    counted = options.keep is None and options.strength is None
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
