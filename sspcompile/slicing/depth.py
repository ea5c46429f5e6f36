"""Which whole layers a budget leaves, and nothing else removed: the ones of least influence, or a run of neighbours.

What a layer counts for in a budget is its price as a whole (`Measure.layer`). Bounds hold exactly: of the layers that
went, none could come back.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sspcompile.errors import BudgetError
from sspcompile.families import Geometry
from sspcompile.slicing.layouts import GONE, Choice
from sspcompile.slicing.measures import Measure
from sspcompile.slicing.sizes import Bounds


def of_layers(g: Geometry, layers: np.ndarray) -> Choice:
    """The mask of whole layers: `layers`, bool [layers], is true where one stays as it is."""
    shape = (g.kv_heads, g.group_size)
    kept = np.repeat(layers[:, None], g.heads, axis=1)
    return Choice(kept, tuple(shape if there else GONE for there in layers.tolist()), layers=layers)


def left_of(measure: Measure, layers: np.ndarray) -> int:
    """What is left of the unit with these layers, bool [layers]."""
    return measure.whole + measure.added - sum(np.array(measure.layer, dtype=object)[~layers].tolist())


def shallowest(measure: Measure) -> int:
    """What is left where only the cheapest layer stays."""
    return measure.whole + measure.added - sum(measure.layer) + min(measure.layer)


def demand_layer(g: Geometry, bounds: Bounds) -> None:
    """Raise BudgetError, naming the nearest feasible value, when the bounds have no room for any one layer."""
    singles = np.eye(g.layers, dtype=bool)
    if any(_fits(bounds, layers) for layers in singles):
        return
    failed = [bound for bound in bounds if bound.most < shallowest(bound.measure)] or [*bounds]
    verb, values = ("is", "value is") if len(failed) == 1 else ("are", "values are")
    raise BudgetError(
        f"{' and '.join(map(str, failed))} {verb} less than what the model needs with one layer.",
        hint=f"The nearest feasible {values} {' '.join(one.typed(shallowest(one.measure)) for one in failed)}.",
    )


def least_influence(influence: np.ndarray, g: Geometry, bounds: Bounds) -> Choice:
    """The mask without the layers of least influence, [layers]; the lower number goes first of two alike.

    Raises BudgetError like `demand_layer`.
    """
    demand_layer(g, bounds)
    order = np.argsort(influence, kind="stable").tolist()
    layers = np.ones(g.layers, dtype=bool)
    for layer in order[:-1]:
        if _fits(bounds, layers):
            break
        layers[layer] = False
    if not _fits(bounds, layers):  # layers differ in price, and the one that is left is too dear
        layers = next(one for one in np.eye(g.layers, dtype=bool)[order[::-1]] if _fits(bounds, one))
    for layer in order[::-1]:
        tried = layers | (np.arange(g.layers) == layer)
        layers = tried if _fits(bounds, tried) else layers
    return of_layers(g, layers)


def any_layers(g: Geometry, bounds: Bounds) -> Choice:
    """As `least_influence` for a model whose layers nobody has looked at: the last ones go."""
    return least_influence(np.arange(g.layers)[::-1], g, bounds)


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


def _fits(bounds: Bounds, layers: np.ndarray) -> bool:
    return all(left_of(bound.measure, layers) <= bound.most for bound in bounds)
