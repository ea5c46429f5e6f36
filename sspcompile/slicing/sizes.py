"""Which heads and channels a number of parameters buys: one shape for all layers, or one per layer.

Heads of a layer go along its staircase of regular shapes (`layouts`), channels of its MLP in steps of a width that
kernels like, the least worth first. *Per layer*, every layer has two ladders, and the next rung is taken where it
costs the least per parameter: masks are nested in the budget. *Uniform*, a shape of heads leaves what the channels of
all layers may share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.checkpoint.tensors import attention_shapes, mlp_shapes, tensor_shapes
from sspcompile.errors import BudgetError
from sspcompile.families import Geometry
from sspcompile.slicing.layouts import Choice, Shape, shaped, staircases

# Channels go in steps of this many, or of fewer where an MLP has not LEAST_STEPS of them.
STEP = 64
LEAST_STEPS = 16


@dataclass(frozen=True)
class Worth:
    """What losing units costs, in one unit: `heads` [layers, heads] and `channels` [layers, intermediate], None where
    all of them stay.
    """

    heads: np.ndarray
    channels: np.ndarray | None


@dataclass(frozen=True)
class Ladder:
    """The states of one part of one layer, the whole one first: `parameters` falls, `value` is what is kept of it."""

    parameters: np.ndarray
    value: np.ndarray

    def price(self, at: int) -> float:
        """Value lost per parameter by the cheapest run of rungs from here; infinite on the last rung."""
        saved = self.parameters[at] - self.parameters[at + 1 :]
        return float(((self.value[at] - self.value[at + 1 :]) / saved).min()) if len(saved) else math.inf


def channel_step(g: Geometry) -> int:
    """In which steps channels are removed: a power of two."""
    step = STEP
    while step > 1 and g.intermediate < LEAST_STEPS * step:
        step //= 2
    return step


def head_parameters(g: Geometry, shape: Shape) -> int:
    """Of one layer's attention with a shape (groups, heads per group)."""
    groups, each = shape
    return sum(math.prod(size) for size in attention_shapes(g, 0, groups * each, groups).values())


def channel_parameters(g: Geometry) -> int:
    """Of one channel of an MLP."""

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
    whole = head_parameters(g, (g.kv_heads, g.group_size))
    removed = sum(whole - head_parameters(g, shape) for shape in choice.shapes)
    removed += channel_parameters(g) * sum(g.intermediate - width for width in choice.widths)
    return 1 - removed / all_parameters(g)


def widths_of(g: Geometry) -> list[int]:
    """The widths that an MLP may be left with, falling."""
    step = channel_step(g)
    return [g.intermediate, *range((g.intermediate - 1) // step * step, 0, -step)]


def smallest_size(g: Geometry, *, channels: bool, groups_only: bool = False) -> float:
    """The smallest share of all parameters that can stay: a head (or group) in every layer, and of its MLP a step of
    channels, or all where `channels` are not cut.
    """
    width = widths_of(g)[-1] if channels else g.intermediate
    return _parameters_of(g, (1, g.group_size if groups_only else 1), width) / all_parameters(g)


def even_worth(g: Geometry, *, channels: bool) -> Worth:
    """For a model whose scores are not known: units fall in worth from first to last, as much per parameter in heads as
    in channels, and in every layer alike, so that a budget takes about the same share of each.
    """
    heads = np.tile(head_share(g) * _falling(g.heads), (g.layers, 1))
    return Worth(heads, np.tile(channel_parameters(g) * _falling(g.intermediate), (g.layers, 1)) if channels else None)


def _falling(units: int) -> np.ndarray:
    return 1 - (np.arange(units) + 0.5) / units


def choose_per_layer(worth: Worth, g: Geometry, size: float, *, groups_only: bool = False) -> Choice:
    """The mask of at most `size` of all parameters, every layer with counts of its own.

    Raises BudgetError, naming the smallest feasible share, when the budget is below it.
    """
    budget = demand_size(g, size, channels=worth.channels is not None, groups_only=groups_only)
    paths, values = staircases(worth.heads, g.kv_heads, groups_only=groups_only)
    ladders = [
        Ladder(np.array([head_parameters(g, shape) for shape in path]), np.array(value))
        for path, value in zip(paths, values, strict=True)
    ]
    widths = widths_of(g)
    if worth.channels is not None:
        sums = np.cumsum(-np.sort(-worth.channels, axis=1), axis=1)
        sizes = channel_parameters(g) * np.array(widths)
        ladders += [Ladder(sizes, layer[np.array(widths) - 1]) for layer in sums]
    at = _walk(ladders, all_parameters(g) - budget)
    shapes = tuple(path[rung] for path, rung in zip(paths, at, strict=False))
    kept = shaped(worth.heads, g.kv_heads, shapes, per_layer=True)
    if worth.channels is None:
        return Choice(kept, shapes)
    return Choice(kept, shapes, _top(_ranks(worth.channels), [widths[rung] for rung in at[g.layers :]]))


def uniform_sizes(worth: Worth, g: Geometry, size: float, *, groups_only: bool = False) -> tuple[Choice, ...]:
    """The uniform masks of at most `size` of all parameters, one for every shape of heads that leaves a step of
    channels, the one of most worth first. Raises BudgetError like `choose_per_layer`.
    """
    cut = worth.channels is not None
    budget = demand_size(g, size, channels=cut, groups_only=groups_only)
    found = []
    ranks = _ranks(worth.channels) if worth.channels is not None else None
    widths, channel = widths_of(g) if cut else [g.intermediate], g.layers * channel_parameters(g)
    for shape in _shapes(g, groups_only=groups_only):
        surplus = _parameters_of(g, shape, g.intermediate) - budget
        width = next((width for width in widths if channel * (g.intermediate - width) >= surplus), None)
        if width is not None:
            kept = shaped(worth.heads, g.kv_heads, (shape,) * g.layers, per_layer=False)
            channels = _top(ranks, [width] * g.layers) if ranks is not None else None
            value = float(worth.heads[kept].sum())
            value += float(worth.channels[channels].sum()) if worth.channels is not None else 0.0
            found.append((value, Choice(kept, (shape,) * g.layers, channels)))
    # A shape with no more heads and no more channels than another is worth no more than that one.
    return tuple(choice for _, choice in sorted(found, key=lambda one: -one[0]))


def demand_size(g: Geometry, size: float, *, channels: bool, groups_only: bool = False) -> int:
    """The parameters that `size`, a share of all, allows.

    Raises BudgetError, naming the nearest feasible share, when the smallest mask has more.
    """
    smallest = smallest_size(g, channels=channels, groups_only=groups_only)
    if size < smallest:
        needs = f"a head and {widths_of(g)[-1]} channels of its MLP" if channels else "a head and its whole MLP"
        raise BudgetError(
            f"--size {size:g} is less than what every layer needs: {needs}.",
            hint=f"The nearest feasible value is --size {math.ceil(1e4 * smallest) / 1e4:g}.",
        )
    # A share that was worked out from a count gives that count back: of 1e11 parameters rounding loses less than this.
    return math.floor(size * all_parameters(g) + 1e-3)


def _shapes(g: Geometry, *, groups_only: bool) -> Iterator[Shape]:
    for groups in range(g.kv_heads, 0, -1):
        for each in (g.group_size,) if groups_only else range(g.group_size, 0, -1):
            yield groups, each


def _parameters_of(g: Geometry, shape: Shape, width: int) -> int:
    """Of the whole model with these counts in every layer."""
    removed = head_parameters(g, (g.kv_heads, g.group_size)) - head_parameters(g, shape)
    return all_parameters(g) - g.layers * (removed + channel_parameters(g) * (g.intermediate - width))


def _walk(ladders: Sequence[Ladder], surplus: int) -> list[int]:
    """The rung of every ladder once at least `surplus` parameters are saved, each step where it costs the least."""
    at = [0] * len(ladders)
    prices = np.array([ladder.price(0) for ladder in ladders])
    while surplus > 0 and prices.min() < np.inf:
        cheapest = int(prices.argmin())
        ladder, rung = ladders[cheapest], at[cheapest]
        surplus -= int(ladder.parameters[rung] - ladder.parameters[rung + 1])
        at[cheapest] = rung + 1
        prices[cheapest] = ladder.price(rung + 1)
    return at


def _ranks(values: np.ndarray) -> np.ndarray:
    """[layers, channels]: the place of every channel in its layer by worth, ties to the lower number."""
    return np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1, kind="stable")


def _top(ranks: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Bool [layers, channels]: the `widths` channels of every layer that are worth most."""
    return np.asarray(ranks < np.array(widths)[:, None])
