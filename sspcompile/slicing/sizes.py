"""Which heads and channels a budget buys, in parameters or bytes: one shape for all layers, or one per layer.

Heads of a layer go along its staircase of regular shapes (`layouts`), channels of its MLP in steps of a width that
kernels like, the least worth first. Where a layer has experts a step is one of every expert: each loses the channels
that it needs least, and all stay equally wide. *Per layer*, every layer has two ladders, and the next rung is taken
where it costs the least per parameter (or byte): masks are nested in the budget. *Uniform*, a shape of heads leaves
what the channels of all layers may share. Of several bounds all hold, and the tightest says what a step is priced by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.checkpoint.tensors import attention_shapes, mlp_shapes, tensor_shapes
from sspcompile.errors import BudgetError
from sspcompile.families import Geometry
from sspcompile.slicing.layouts import Choice, Shape, shaped, staircases, uniform_values
from sspcompile.slicing.measures import Bound, Measure, parameters_of

# Channels go in steps of this many, or of fewer where an MLP has not LEAST_STEPS of them.
STEP = 64
LEAST_STEPS = 16
# All experts of a layer are multiplied by one kernel, which takes rows of a multiple of 16 bytes: so many numbers of 16
# bits (torch's grouped_mm, by which transformers 5 runs experts).
EXPERT_STEP = 8
Bounds = Sequence[Bound]


@dataclass(frozen=True)
class Worth:
    """What losing units costs, in one unit: `heads` [layers, heads] and `channels` [layers, mlps * width], None where
    all of them stay.
    """

    heads: np.ndarray
    channels: np.ndarray | None


@dataclass(frozen=True)
class Counts:
    """What stays of every layer: a shape (groups, heads per group), and a width of its MLPs (nothing: all channels)."""

    shapes: tuple[Shape, ...]
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ladder:
    """The states of one part of one layer, the whole one first: `value` is what is kept of it, `amounts` what each of
    the bounds counts of it, [bounds][rungs]; both fall.
    """

    amounts: tuple[tuple[int, ...], ...]
    value: np.ndarray

    def prices(self) -> np.ndarray:
        """What every rung but the last costs: value lost for each unit of the first bound by the cheapest run of rungs
        from there (Andrew's monotone chain, from the last rung up), and no less than the rungs before it: once a run is
        begun, what is left of it costs less.
        """
        amount, value = np.array(self.amounts[0], dtype=float).tolist(), self.value.tolist()

        def slope(larger: int, smaller: int) -> float:
            return (value[larger] - value[smaller]) / (amount[larger] - amount[smaller])

        chain, found = [len(value) - 1], []
        for rung in range(len(value) - 2, -1, -1):
            while len(chain) > 1 and slope(rung, chain[-1]) >= slope(chain[-1], chain[-2]):
                chain.pop()
            found.append(slope(rung, chain[-1]))
            chain.append(rung)
        return np.maximum.accumulate(np.array(found[::-1]))


def channel_step(g: Geometry) -> int:
    """In which steps channels are removed: a power of two, and of experts no less than EXPERT_STEP."""
    step = STEP
    while step > 1 and g.width < LEAST_STEPS * step:
        step //= 2
    return step if g.is_dense else max(step, EXPERT_STEP)


def head_parameters(g: Geometry, shape: Shape) -> int:
    """Of one layer's attention with a shape (groups, heads per group)."""
    groups, each = shape
    return sum(math.prod(size) for size in attention_shapes(g, 0, groups * each, groups).values())


def channel_parameters(g: Geometry) -> int:
    """Of one channel of an MLP, or of one of every expert of a layer."""

    def whole(width: int) -> int:
        return sum(math.prod(size) for size in mlp_shapes(g, 0, width).values())

    return whole(2) - whole(1)


def head_share(g: Geometry) -> float:
    """Parameters of one layer's attention for each of its query heads."""
    return head_parameters(g, (g.kv_heads, g.group_size)) / g.heads


def all_parameters(g: Geometry) -> int:
    return sum(math.prod(size) for size in tensor_shapes(g).values())


def share_of(g: Geometry, choice: Choice) -> float:
    """What a mask leaves of all parameters."""
    measure = parameters_of(g)
    return measure.kept(g, choice.shapes, choice.widths) / measure.whole


def widths_of(g: Geometry) -> list[int]:
    """The widths that an MLP may be left with, falling."""
    step = channel_step(g)
    return [g.width, *range((g.width - 1) // step * step, 0, -step)]


def smallest_counts(g: Geometry, *, channels: bool, groups_only: bool = False) -> Counts:
    """The least that can stay: a head (or group) in every layer, and of its MLP a step of channels, or all where
    `channels` are not cut.
    """
    shape = (1, g.group_size if groups_only else 1)
    return Counts((shape,) * g.layers, (widths_of(g)[-1],) * g.layers if channels else ())


def smallest_share(measure: Measure, g: Geometry, *, channels: bool, groups_only: bool = False) -> float:
    """The smallest share of what is counted that can stay."""
    least = smallest_counts(g, channels=channels, groups_only=groups_only)
    return measure.kept(g, least.shapes, least.widths) / measure.whole


def smallest_size(g: Geometry, *, channels: bool, groups_only: bool = False) -> float:
    """The smallest share of all parameters that can stay."""
    return smallest_share(parameters_of(g), g, channels=channels, groups_only=groups_only)


def even_worth(g: Geometry, *, channels: bool) -> Worth:
    """For a model whose scores are not known: units fall in worth from first to last, as much per parameter in heads as
    in channels, and in every layer alike, so that a budget takes about the same share of each.
    """
    heads = np.tile(head_share(g) * _falling(g.heads), (g.layers, 1))
    each = channel_parameters(g) / g.mlps * _falling(g.width)
    return Worth(heads, np.tile(each, (g.layers, g.mlps)) if channels else None)


def _falling(units: int) -> np.ndarray:
    return 1 - (np.arange(units) + 0.5) / units


def choose_per_layer(worth: Worth, g: Geometry, bounds: Bounds, *, groups_only: bool = False) -> Choice:
    """The mask within the bounds, every layer with counts of its own.

    Raises BudgetError, naming the nearest feasible value, when a bound is below the smallest mask.
    """
    (counts,) = per_layer_counts(worth, g, [bounds], groups_only=groups_only)
    return realised(worth, g, counts, per_layer=True)


def per_layer_counts(
    worth: Worth, g: Geometry, budgets: Sequence[Bounds], *, groups_only: bool = False
) -> list[Counts]:
    """What stays under each of the budgets, which fall: bounds of the same measures in the same order. One walk finds
    them all. Raises like `choose_per_layer`.
    """
    for bounds in budgets:
        demand(g, bounds, channels=worth.channels is not None, groups_only=groups_only)
    order = sorted(range(len(budgets[0])), key=lambda number: budgets[0][number].share)
    measures = [budgets[0][number].measure for number in order]
    paths, values = staircases(worth.heads, g.kv_heads, groups_only=groups_only)
    ladders = [
        Ladder(tuple(tuple(m.attention(layer, shape) for shape in path) for m in measures), np.array(value))
        for layer, (path, value) in enumerate(zip(paths, values, strict=True))
    ]
    widths = widths_of(g)
    if worth.channels is not None:
        sums = _kept_values(worth.channels, g)[:, np.array(widths) - 1]
        ladders += [
            Ladder(tuple(tuple(m.channel[layer] * width for width in widths) for m in measures), value)
            for layer, value in enumerate(sums)
        ]
    ordered = [[bounds[number] for number in order] for bounds in budgets]
    surplus = [[b.measure.whole + b.measure.added - b.most for b in bounds] for bounds in ordered]
    return [
        Counts(
            tuple(path[rung] for path, rung in zip(paths, at, strict=False)),
            tuple(widths[rung] for rung in at[g.layers :]),
        )
        for at in _walk(ladders, surplus)
    ]


def realised(worth: Worth, g: Geometry, counts: Counts, *, per_layer: bool, ranks: np.ndarray | None = None) -> Choice:
    """The mask of the best units in these counts; `ranks` of the channels where the caller has them."""
    kept = shaped(worth.heads, g.kv_heads, counts.shapes, per_layer=per_layer)
    if worth.channels is None:
        return Choice(kept, counts.shapes)
    ranks = _ranks(worth.channels, g) if ranks is None else ranks
    return Choice(kept, counts.shapes, _top(ranks, counts.widths), mlps=g.mlps)


def uniform_sizes(worth: Worth, g: Geometry, bounds: Bounds, *, groups_only: bool = False) -> tuple[Choice, ...]:
    """The uniform masks within the bounds, one for every shape of heads that leaves a step of channels, the one of most
    worth first. Raises BudgetError like `choose_per_layer`.
    """
    ranked = uniform_ranked(worth, g, bounds, groups_only=groups_only)
    ranks = _ranks(worth.channels, g) if worth.channels is not None else None
    return tuple(realised(worth, g, counts, per_layer=False, ranks=ranks) for counts in ranked)


def uniform_ranked(worth: Worth, g: Geometry, bounds: Bounds, *, groups_only: bool = False) -> list[Counts]:
    """What stays in the masks of `uniform_sizes`, in their order."""
    # A shape with no more heads and no more channels than another is worth no more than that one.
    found = uniform_counts(g, bounds, channels=worth.channels is not None, groups_only=groups_only)
    return sorted(found, key=uniform_worth(worth, g), reverse=True)


def uniform_worth(worth: Worth, g: Geometry) -> Callable[[Counts], float]:
    """What the best units in uniform counts are worth."""
    heads = uniform_values(worth.heads, g.kv_heads)
    channels = None if worth.channels is None else _kept_values(worth.channels, g).sum(0)

    def value(counts: Counts) -> float:
        groups, each = counts.shapes[0]
        of_heads = float(heads[groups - 1, each - 1])
        return of_heads if channels is None else of_heads + float(channels[counts.widths[0] - 1])

    return value


def _kept_values(channels: np.ndarray, g: Geometry) -> np.ndarray:
    """[layers, width]: what the best 1, 2, ... channels of every MLP are worth, summed over the MLPs of a layer."""
    return np.cumsum(-np.sort(-_by_mlp(channels, g), axis=2), axis=2).sum(1)


def _by_mlp(channels: np.ndarray, g: Geometry) -> np.ndarray:
    """[layers, mlps * width] -> [layers, mlps, width]"""
    return channels.reshape(len(channels), g.mlps, g.width)


def uniform_counts(g: Geometry, bounds: Bounds, *, channels: bool, groups_only: bool = False) -> Iterator[Counts]:
    """For every shape of heads that the bounds leave any channels, the widest that they do. Raises BudgetError like
    `choose_per_layer`.
    """
    demand(g, bounds, channels=channels, groups_only=groups_only)
    widths = widths_of(g) if channels else [g.width]
    for shape in _shapes(g, groups_only=groups_only):
        shapes = (shape,) * g.layers
        room = g.width
        for bound in bounds:
            surplus = bound.measure.kept(g, shapes) - bound.most
            if surplus > 0:
                price = sum(bound.measure.channel)
                room = min(room, g.width + -surplus // price if price else -1)
        width = next((width for width in widths if width <= room), None)
        if width is not None:
            yield Counts(shapes, (width,) * g.layers if channels else ())


def demand(g: Geometry, bounds: Bounds, *, channels: bool, groups_only: bool = False) -> None:
    """Raise BudgetError, naming the nearest feasible value, when the smallest mask has more than a bound allows."""
    least = smallest_counts(g, channels=channels, groups_only=groups_only)
    smallest = {bound: bound.measure.kept(g, least.shapes, least.widths) for bound in bounds}
    failed = [bound for bound in bounds if bound.most < smallest[bound]]
    if failed:
        width, mlp = widths_of(g)[-1], "its MLP" if g.mlps == 1 else "each of its experts"
        needs = f"a head and {width} channels of {mlp}" if channels else "a head and its whole MLP"
        verb, values = ("is", "value is") if len(failed) == 1 else ("are", "values are")
        raise BudgetError(
            f"{' and '.join(map(str, failed))} {verb} less than what every layer needs: {needs}.",
            hint=f"The nearest feasible {values} {' '.join(bound.typed(smallest[bound]) for bound in failed)}.",
        )


def _shapes(g: Geometry, *, groups_only: bool) -> Iterator[Shape]:
    for groups in range(g.kv_heads, 0, -1):
        for each in (g.group_size,) if groups_only else range(g.group_size, 0, -1):
            yield groups, each


def _walk(ladders: Sequence[Ladder], surpluses: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The rung of every ladder once at least a surplus of every bound is saved, for each surplus; each step is taken
    where it costs the least, in the first of equal ladders.
    """
    known: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
    for ladder in ladders:  # of a model whose scores are not known all layers have one
        key = ladder.amounts[0], ladder.value.tobytes()
        known[key] = ladder.prices() if key not in known else known[key]
    prices = [known[ladder.amounts[0], ladder.value.tobytes()] for ladder in ladders]
    owner = np.repeat(np.arange(len(ladders)), [len(one) for one in prices])
    order = np.argsort(np.concatenate(prices), kind="stable")
    saved = [
        np.cumsum(np.concatenate([-np.diff(np.array(ladder.amounts[bound])) for ladder in ladders])[order])
        for bound in range(len(surpluses[0]))
    ]
    for surplus in surpluses:
        steps = [np.searchsorted(one, wanted) + 1 for one, wanted in zip(saved, surplus, strict=True) if wanted > 0]
        taken = owner[order[: max(steps, default=0)]]
        yield np.bincount(taken, minlength=len(ladders)).tolist()


def _ranks(channels: np.ndarray, g: Geometry) -> np.ndarray:
    """[layers, mlps * width]: the place of every channel in its MLP by worth, ties to the lower number."""
    order = np.argsort(-_by_mlp(channels, g), axis=2, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(g.width)[None, None], axis=2)
    return ranks.reshape(channels.shape)


def _top(ranks: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Bool [layers, mlps * width]: the `widths` channels of every MLP that are worth most."""
    return np.asarray(ranks < np.array(widths)[:, None])
