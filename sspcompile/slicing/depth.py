"""Which layers a budget leaves whole, and nothing else removed: without the ones of least influence, or a run of
neighbours. The same of the attention of layers, whose MLPs stay.

What a layer counts for in a budget is its price as a whole (`Measure.layer`, `Measure.attention_whole`). Bounds hold
exactly: of what went, nothing could come back.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.families import Geometry
from sspcompile.request.options import Whole
from sspcompile.slicing.layouts import GONE, SILENT, Choice
from sspcompile.slicing.measures import Measure
from sspcompile.slicing.sizes import Bounds


def of_layers(g: Geometry, layers: np.ndarray, whole: Whole = "layers") -> Choice:
    """The mask of whole layers, or attention: `layers`, bool [layers], is true where one stays as it is."""
    shape, gone = (g.kv_heads, g.group_size), GONE if whole == "layers" else SILENT
    kept = np.repeat(layers[:, None], g.heads, axis=1)
    shapes = tuple(shape if there else gone for there in layers.tolist())
    return Choice(kept, shapes, layers=layers if whole == "layers" else None)


def left_of(measure: Measure, layers: np.ndarray, whole: Whole = "layers") -> int:
    """What is left of the unit with these layers, or their attention, bool [layers]."""
    return measure.whole + measure.added - sum(np.array(_prices(measure, whole), dtype=object)[~layers].tolist())


def shallowest(measure: Measure, whole: Whole = "layers") -> int:
    """What is left where only the cheapest layer, or its attention, stays."""
    prices = _prices(measure, whole)
    return measure.whole + measure.added - sum(prices) + min(prices)


def _prices(measure: Measure, whole: Whole) -> tuple[int, ...]:
    return measure.layer if whole == "layers" else measure.attention_whole


def demand_layer(g: Geometry, bounds: Bounds, whole: Whole = "layers") -> None:
    """Raise BudgetError, naming the nearest feasible value, when the bounds have no room for any one layer, or its
    attention.
    """
    singles = np.eye(g.layers, dtype=bool)
    if any(_fits(bounds, layers, whole) for layers in singles):
        return
    failed = [bound for bound in bounds if bound.most < shallowest(bound.measure, whole)] or [*bounds]
    verb, values = ("is", "value is") if len(failed) == 1 else ("are", "values are")
    one = "one layer" if whole == "layers" else "the attention of one layer"
    raise BudgetError(
        f"{' and '.join(map(str, failed))} {verb} less than what the model needs with {one}.",
        hint=f"The nearest feasible {values} {' '.join(one.typed(shallowest(one.measure, whole)) for one in failed)}.",
    )


def least_influence(influence: np.ndarray, g: Geometry, bounds: Bounds, whole: Whole = "layers") -> Choice:
    """The mask without the layers, or attention, of least influence [layers]; of two alike the lower number goes first.

    Raises BudgetError like `demand_layer`.
    """
    demand_layer(g, bounds, whole)
    order = np.argsort(influence, kind="stable").tolist()
    layers = np.ones(g.layers, dtype=bool)
    for layer in order[:-1]:
        if _fits(bounds, layers, whole):
            break
        layers[layer] = False
    if not _fits(bounds, layers, whole):  # layers differ in price, and the one that is left is too dear
        layers = next(one for one in np.eye(g.layers, dtype=bool)[order[::-1]] if _fits(bounds, one, whole))
    for layer in order[::-1]:
        tried = layers | (np.arange(g.layers) == layer)
        layers = tried if _fits(bounds, tried, whole) else layers
    return of_layers(g, layers, whole)


def any_layers(g: Geometry, bounds: Bounds, whole: Whole = "layers") -> Choice:
    """As `least_influence` for a model whose layers nobody has looked at: the last ones go."""
    return least_influence(np.arange(g.layers)[::-1], g, bounds, whole)


def least_runs(distances: np.ndarray, g: Geometry, bounds: Bounds) -> Iterator[Choice]:
    """The masks without one run of neighbouring layers, no longer than the bounds ask for, the run of least influence
    first: `distances` [layers + 1, layers + 1] says how far the states before two layers are apart (the last of them:
    behind all layers).
    """
    found = []
    for start in range(g.layers):
        for stop in range(start, g.layers + 1):
            layers = np.ones(g.layers, dtype=bool)
            layers[start:stop] = False
            if layers.any() and _fits(bounds, layers):
                found.append((float(distances[start, stop]), start, layers))
                break
    for _, _, layers in sorted(found, key=lambda one: one[:2]):
        yield of_layers(g, layers)


def _fits(bounds: Bounds, layers: np.ndarray, whole: Whole = "layers") -> bool:
    return all(left_of(bound.measure, layers, whole) <= bound.most for bound in bounds)
