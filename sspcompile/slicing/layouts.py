"""Which regular shape a budget buys: the same in every layer, or one per layer.

In a layer, a shape is a pair (groups, heads per group).

*Per layer*, the heads of a shape are fixed once: groups are ranked by the merit of all their heads, heads by merit
within their group. A smaller pair therefore keeps a subset of what a larger one keeps, and a budget walks down one
staircase of pairs: masks are nested in the budget.

*Uniform*, the shape is the pair with the largest kept merit inside the budget. Nested masks would need one staircase
for all layers, and none passes the best pair of every budget (half of 4 groups of 2 may be 2 groups, or 1 head in
each): a budget of half the heads could end at three eighths. What a budget allows is worth more than nestedness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.slicing.mask import Kept, Layout, kept_of

Shape = tuple[int, int]
# No groups: of a layer that is removed whole, and of one that stays without its attention.
GONE: Shape = (0, 0)
SILENT: Shape = (0, 1)


@dataclass(frozen=True)
class Choice:
    """A mask: `kept` heads, bool [layers, heads], the shape (groups, heads per group) of every layer, and the kept
    `channels` of its MLPs, bool [layers, mlps * width] (None: all of them), as many of each of the `mlps` of a layer.
    `layers`, bool [layers]: those that are there at all (None: all); the others have the shape GONE. One that is there
    and keeps no head has lost its attention, and has the shape SILENT.
    """

    kept: np.ndarray
    shapes: tuple[Shape, ...]
    channels: np.ndarray | None = None
    layers: np.ndarray | None = None
    mlps: int = 1

    @property
    def units(self) -> Kept:
        return Kept(self.kept, self.channels, self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept channels of each MLP of every layer; nothing where all stay."""
        return () if self.channels is None else tuple((self.channels.sum(1) // self.mlps).tolist())

    @property
    def kept_channels(self) -> tuple[tuple[int, ...], ...] | None:
        """The kept channels of every layer, ascending; None where no layer loses one."""
        return None if self.channels is None or self.channels.all() else kept_of(self.channels)

    @property
    def ratio(self) -> float:
        return float(self.kept.mean())


def choose(merit: np.ndarray, kv_heads: int, keep: float, layout: Layout, *, groups_only: bool = False) -> Choice:
    """The largest mask of a layout within `keep` (kept heads / all heads, a hard upper bound).

    `merit` is [layers, heads]. With `groups_only` every group that stays keeps all of its heads. Raises BudgetError,
    naming the smallest feasible ratio, when even one head per layer (or one group) is more than the budget.
    """
    layers, heads = merit.shape
    size = heads // kv_heads
    budget = int(np.floor(keep * layers * heads + 1e-9))
    if budget < layers * (size if groups_only else 1):
        smallest = smallest_keep(heads, kv_heads, groups_only=groups_only)
        raise BudgetError(
            f"--keep {keep:g} allows {budget} heads, but each of the {layers} layers needs at least "
            + (f"one group of {size}." if groups_only else "one."),
            hint=f"The nearest feasible value is --keep {np.ceil(1e6 * smallest) / 1e6:g}.",
        )
    grouped = merit.reshape(layers, kv_heads, size)
    if groups_only:
        # A group as a whole is the only head of its own group; the walk below is the same.
        chosen = _choose(grouped.sum(-1, keepdims=True), budget // size, layout)
        return Choice(np.repeat(chosen.kept, size, axis=1), tuple((groups, size) for groups, _ in chosen.shapes))
    return _choose(grouped, budget, layout)


def smallest_keep(heads: int, kv_heads: int, *, groups_only: bool = False) -> float:
    """The smallest share of heads that can stay: one head in every layer, or one group."""
    return (heads // kv_heads if groups_only else 1) / heads


def uniform_choices(merit: np.ndarray, kv_heads: int, keep: float, *, groups_only: bool = False) -> tuple[Choice, ...]:
    """The uniform masks within `keep`, one for each shape that no other feasible one contains; the largest first.

    Merit compares heads within a layer better than it compares shapes, so a caller who can measure should. Raises
    BudgetError like `choose`.
    """
    best = choose(merit, kv_heads, keep, "uniform", groups_only=groups_only)
    if groups_only:
        return (best,)
    layers, heads = merit.shape
    grouped = merit.reshape(layers, kv_heads, heads // kv_heads)
    budget = int(np.floor(keep * layers * heads + 1e-9))
    feasible = [
        (g, r) for g in range(1, kv_heads + 1) for r in range(1, grouped.shape[2] + 1) if layers * g * r <= budget
    ]
    widest = [s for s in feasible if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in feasible)]
    return tuple(_uniform(grouped, shape) for shape in sorted(widest, key=lambda s: (-s[0] * s[1], s[0])))


def staircases(
    merit: np.ndarray, kv_heads: int, *, groups_only: bool = False
) -> tuple[list[list[Shape]], list[list[float]]]:
    """Every layer's shapes from all heads down to the smallest, and the merit that each keeps; `merit` is
    [layers, heads].
    """
    layers, heads = merit.shape
    size = heads // kv_heads
    grouped = merit.reshape(layers, kv_heads, size)
    if groups_only:
        paths = [[(groups, size) for groups in range(kv_heads, 0, -1)]] * layers
    else:
        paths = [_staircase(_values(layer)) for layer in grouped]
    values = [
        [float(_values(layer)[g - 1, r - 1]) for g, r in path] for layer, path in zip(grouped, paths, strict=True)
    ]
    return paths, values


def shaped(merit: np.ndarray, kv_heads: int, shapes: Sequence[Shape], *, per_layer: bool) -> np.ndarray:
    """Bool [layers, heads]: the best heads of every layer in its shape, as `choose` takes them in that layout."""
    layers, heads = merit.shape
    grouped = merit.reshape(layers, kv_heads, heads // kv_heads)
    of_groups = [
        layer.sum(-1) if per_layer else _top_sums(layer)[:, r - 1]
        for layer, (_, r) in zip(grouped, shapes, strict=True)
    ]
    kept = [_mask_of(*each) for each in zip(grouped, shapes, of_groups, strict=True)]
    return np.stack(kept).reshape(layers, heads)


def _uniform(grouped: np.ndarray, shape: Shape) -> Choice:
    kept = np.stack([_mask_of(layer, shape, _top_sums(layer)[:, shape[1] - 1]) for layer in grouped])
    return Choice(kept.reshape(len(kept), -1), (shape,) * len(kept))


def _choose(grouped: np.ndarray, budget: int, layout: Layout) -> Choice:
    """The largest mask of at most `budget` heads for merit [layers, groups, heads per group]."""
    if layout == "uniform":
        return _uniform(grouped, _best_uniform(grouped, budget))
    shapes = next(shapes for shapes, size in _per_layer_steps(grouped) if size <= budget)
    kept = np.stack([_mask_of(layer, shape, layer.sum(-1)) for layer, shape in zip(grouped, shapes, strict=True)])
    return Choice(kept.reshape(len(kept), -1), shapes)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value when sorted from high to low along the last axis; ties go to the lower index."""
    order = np.argsort(-values, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def _mask_of(merit: np.ndarray, shape: Shape, of_groups: np.ndarray) -> np.ndarray:
    """Bool [groups, heads per group] of one layer: the best groups by their merit [groups], in them the best heads."""
    groups, per_group = shape
    return (_ranks(of_groups) < groups)[:, None] & (_ranks(merit) < per_group)


def _top_sums(merit: np.ndarray) -> np.ndarray:
    """Merit of the best 1, 2, ... heads of every group, [groups, heads per group]."""
    return (-np.sort(-merit, axis=-1)).cumsum(-1)


def _values(merit: np.ndarray) -> np.ndarray:
    """Merit kept by every shape of one layer, [groups, heads per group], index 0 standing for a count of 1."""
    by_group = merit[np.argsort(-merit.sum(-1), kind="stable")]
    ordered = -np.sort(-by_group, axis=-1)
    return ordered.cumsum(1).cumsum(0)


def _staircase(values: np.ndarray) -> list[Shape]:
    """The monotone path of shapes from all heads down to (1, 1) under which the kept merit is largest.

    A shape serves every budget from its own size up to the size of the next one, so the path maximises the sum over
    shapes of value * (size of the next larger shape - own size), by dynamic programming over the lattice.
    """
    groups, per_group = values.shape
    best = np.full((groups, per_group), -np.inf)
    came: dict[Shape, Shape] = {}
    best[-1, -1] = 0.0
    for g in range(groups, 0, -1):
        for r in range(per_group, 0, -1):
            for larger in ((g + 1, r), (g, r + 1)):
                if larger[0] > groups or larger[1] > per_group:
                    continue
                gain = values[g - 1, r - 1] * (larger[0] * larger[1] - g * r)
                total = best[larger[0] - 1, larger[1] - 1] + gain
                if total > best[g - 1, r - 1]:
                    best[g - 1, r - 1] = total
                    came[g, r] = larger
    path = [(1, 1)]
    while path[-1] in came:
        path.append(came[path[-1]])
    return path[::-1]


def _best_uniform(merit: np.ndarray, budget: int) -> Shape:
    """The shape of all layers with the largest kept merit among those of at most `budget` heads in all.

    Between equals the larger one, then the one of fewer groups, which saves more of the key/value cache.
    """
    layers, groups, per_group = merit.shape
    shapes = [(g, r) for g in range(1, groups + 1) for r in range(1, per_group + 1) if layers * g * r <= budget]
    values = _uniform_values(merit)
    return max(shapes, key=lambda shape: (values[shape[0] - 1, shape[1] - 1], shape[0] * shape[1], -shape[0]))


def uniform_values(merit: np.ndarray, kv_heads: int) -> np.ndarray:
    """Merit kept by every uniform shape, [groups, heads per group], index 0 standing for a count of 1; `merit` is
    [layers, heads].
    """
    layers, heads = merit.shape
    return _uniform_values(merit.reshape(layers, kv_heads, heads // kv_heads))


def _uniform_values(merit: np.ndarray) -> np.ndarray:
    """The best g groups of every layer when each keeps its best r heads."""
    return np.asarray(np.sum([(-np.sort(-_top_sums(layer), axis=0)).cumsum(0) for layer in merit], axis=0))


def _per_layer_steps(merit: np.ndarray) -> list[tuple[tuple[Shape, ...], int]]:
    """Walk every layer down its own staircase; each step is taken where it costs the least merit per head."""
    layers = merit.shape[0]
    values = [_values(layer) for layer in merit]
    paths = [_staircase(value) for value in values]
    at = [0] * layers

    def price(layer: int) -> float:
        """Merit lost per head by the cheapest run of steps from here: a dear step may open the way to cheap ones."""
        here = paths[layer][at[layer]]
        start, size = values[layer][here[0] - 1, here[1] - 1], here[0] * here[1]
        return min((start - values[layer][g - 1, r - 1]) / (size - g * r) for g, r in paths[layer][at[layer] + 1 :])

    prices = [price(layer) if len(paths[layer]) > 1 else np.inf for layer in range(layers)]
    sizes = [g * r for g, r in (path[0] for path in paths)]
    steps = [(tuple(path[0] for path in paths), sum(sizes))]
    while min(prices) < np.inf:
        layer = int(np.argmin(prices))
        at[layer] += 1
        g, r = paths[layer][at[layer]]
        sizes[layer] = g * r
        prices[layer] = price(layer) if at[layer] + 1 < len(paths[layer]) else np.inf
        steps.append((tuple(path[i] for path, i in zip(paths, at, strict=True)), sum(sizes)))
    return steps
