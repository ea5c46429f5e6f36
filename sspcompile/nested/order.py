"""In which order units go, and what a prefix of that order is as a mask of the dense model.

Masks of one worth are nested in the budget (`slicing.sizes`): a layer that may keep less keeps the best of what it
kept. So one order per layer says it all, and a member is two numbers per layer: how many key/value groups of that order
it keeps, each with all of its query heads, and how many channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.errors import ArtifactError, InputError, UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.request.options import Options
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.left import LayerCut
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import SlicePlan
from sspcompile.slicing.sizes import Worth


@dataclass(frozen=True)
class Order:
    """Units of the dense model, by layer, the one that is kept longest first: key/value `groups` [layers][kv_heads],
    and `channels` [layers][intermediate], None where no size removes any.
    """

    groups: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True)
class Prefix:
    """How many key/value groups and how many channels of the MLP every layer keeps."""

    groups: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A `share` of all parameters that was asked for, and what it keeps: as a mask of the dense model, as a prefix."""

    share: float
    mask: HeadMask
    prefix: Prefix


def order_of(worth: Worth, g: Geometry) -> Order:
    """The order in which budgets take units of this worth: that of `realised`, ties to the lower number."""
    of_groups = worth.heads.reshape(g.layers, g.kv_heads, g.group_size).sum(-1)
    return Order(_falling(of_groups), None if worth.channels is None else _falling(worth.channels))


def _falling(values: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, np.argsort(-values, axis=1, kind="stable").tolist()))


def prefix_of(choice: Choice, g: Geometry) -> Prefix:
    """What a mask of whole groups keeps, as numbers."""
    return Prefix(tuple(groups for groups, _ in choice.shapes), choice.widths or (g.intermediate,) * g.layers)


def reordered(plan: SlicePlan, order: Order) -> SlicePlan:
    """The plan that keeps everything of a dense model, with its units in this order."""
    size = plan.geometry.group_size
    channels = order.channels or (None,) * plan.geometry.layers
    layers = tuple(
        LayerCut(tuple(group * size + each for group in groups for each in range(size)), groups, channels=row)
        for groups, row in zip(order.groups, channels, strict=True)
    )
    return replace(plan, layers=layers)


def restored(plan: SlicePlan, order: Order, prefix: Prefix) -> SlicePlan:
    """The plan of a member's mask, for a source whose units lie in this order: its output is in the dense order.

    Raises ArtifactError where the mask is no prefix of the order.
    """
    g = plan.geometry
    layers = []
    for index, layer in enumerate(plan.layers):
        groups = places(order.groups[index], prefix.groups[index], layer.groups)
        channels = layer.channels
        if order.channels is not None:
            wanted = channels if channels is not None else tuple(range(g.intermediate))
            channels = places(order.channels[index], prefix.widths[index], wanted)
        if len(layer.heads) != len(groups) * g.group_size:
            raise _no_prefix()
        heads = tuple(place * g.group_size + each for place in groups for each in range(g.group_size))
        layers.append(LayerCut(heads, groups, channels=channels))
    return replace(plan, layers=tuple(layers))


def places(order: Sequence[int], count: int, kept: Sequence[int]) -> tuple[int, ...]:
    """Where the kept units lie in an order of which they are the first `count`. Raises ArtifactError."""
    at = {unit: place for place, unit in enumerate(order[:count])}
    if len(kept) != count or not all(unit in at for unit in kept):
        raise _no_prefix()
    return tuple(at[unit] for unit in kept)


def columns(mask: HeadMask, order: Order, prefix: Prefix, layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a member's groups, and its channels, lie in the tensors of its repair, in the dense order."""
    groups = places(order.groups[layer], prefix.groups[layer], mask.kept_groups(layer))
    if order.channels is None:
        return groups, tuple(range(prefix.widths[layer]))
    kept = mask.channels[layer] if mask.channels is not None else tuple(range(prefix.widths[layer]))
    return groups, places(order.channels[layer], prefix.widths[layer], kept)


def _no_prefix() -> ArtifactError:
    return ArtifactError("A member's mask is not a prefix of the order of removal.", hint="Build the artifact again.")


def demand_nestable(g: Geometry, options: Options) -> None:
    """Raise UnsupportedModelError for tensors of which no member is a prefix, InputError for options that contradict.

    A fused tensor holds its parts one above the other: a prefix of it is not one of every part.
    """
    if g.family.fused_qkv or g.family.experts is not None or any("twice" in part.rows for part in g.family.mlp):
        raise UnsupportedModelError(
            f"{g.family.architecture} stores fused or stacked tensors, of which no smaller model is a prefix.",
            hint="Build one size at a time, as --size 0.8.",
        )
    if options.layout == "uniform" or options.wanted_host is not None:
        asked = "--layout uniform" if options.layout == "uniform" else f"--host {options.host}"
        raise InputError(f"--nested and {asked} exclude each other.", hint="Counts differ by layer; leave it out.")
    if options.repair == "flap-bias":
        raise InputError("--nested has no biases to repair with.", hint="Use --repair least-squares, or none.")
