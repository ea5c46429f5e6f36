"""SlicePlan: what a mask does to a checkpoint, worked out from headers or from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sspcompile.checkpoint.source import Checkpoint, dtype_bytes
from sspcompile.compile.layouts import choose
from sspcompile.compile.mask import HeadMask, Layout, check_mask, kept_of
from sspcompile.errors import ArtifactError
from sspcompile.families import Family, Geometry, attention_shapes, layer_prefix, per_layer_host_for, uniform_host_for
from sspcompile.slicing.runtimes import Verdict, verdicts

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerCut:
    """Kept query heads and kept key/value heads of one layer, ascending indices of the dense model."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """`parameters` counts elements, tied weights once; bytes as stored. KV bytes: 2 * kv heads * head_dim * bytes."""

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class SlicePlan:
    """Everything about the cut except the weights. `tensors`: output name -> (shape, dtype), in the source's order.

    `host` is the family of the class that loads the result; `custom_code` says that head counts differ by layer, so
    that the class travels in the folder.
    """

    geometry: Geometry
    host: Family
    layout: Layout
    custom_code: bool
    layers: tuple[LayerCut, ...]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    dense: Sizes
    sliced: Sizes
    prunable_share: float
    runtimes: tuple[Verdict, ...]

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """(query heads, key/value heads) of every layer after the cut."""
        return tuple((len(layer.heads), len(layer.groups)) for layer in self.layers)

    @property
    def keeps_everything(self) -> bool:
        return set(self.counts) == {(self.geometry.heads, self.geometry.kv_heads)}


def make_plan(checkpoint: Checkpoint, mask: HeadMask) -> SlicePlan:
    """Plan the cut of `mask` out of `checkpoint`. Raises ArtifactError when they do not fit each other, and
    UnsupportedModelError when no class holds the result."""
    g = checkpoint.geometry
    check_mask(mask)
    if (mask.layers, mask.heads, mask.kv_heads) != (g.layers, g.heads, g.kv_heads):
        raise ArtifactError(
            f"The mask is for {mask.layers} layers of {mask.heads} heads ({mask.kv_heads} kv); the model has "
            f"{g.layers} of {g.heads} ({g.kv_heads} kv).",
            hint="Compile a mask for this model with `sspcompile build`.",
        )
    layers = tuple(LayerCut(kept, mask.kept_groups(layer)) for layer, kept in enumerate(mask.kept))
    return _plan(checkpoint, layers, mask.layout)


def plan_counts(checkpoint: Checkpoint, keep: float, layout: Layout) -> SlicePlan:
    """Plan by head counts alone, for a model whose scores are not known: every head counts the same.

    The sizes are those of any mask with these counts; which heads stay is left open. Raises BudgetError.
    """
    g = checkpoint.geometry
    choice = choose(np.ones((g.layers, g.heads)), g.kv_heads, keep, layout)
    kept = kept_of(choice.kept)
    groups = [tuple(sorted({head // g.group_size for head in row})) for row in kept]
    return _plan(checkpoint, tuple(LayerCut(k, v) for k, v in zip(kept, groups, strict=True)), layout)


def host_of(geometry: Geometry, shapes: Sequence[tuple[int, int]]) -> Family:
    """The family whose class holds layers of these shapes (groups, heads per group), custom or stock.

    Raises UnsupportedModelError when there is none.
    """
    if len(set(shapes)) > 1:
        return per_layer_host_for(geometry)
    return uniform_host_for(geometry, shapes[0][0] * shapes[0][1])


def _plan(checkpoint: Checkpoint, layers: tuple[LayerCut, ...], layout: Layout) -> SlicePlan:
    g = checkpoint.geometry
    counts = [(len(layer.heads), len(layer.groups)) for layer in layers]
    custom = len(set(counts)) > 1
    host = host_of(g, tuple((kv_heads, heads // kv_heads) for heads, kv_heads in counts))
    expected = checkpoint.expected()
    dtype = expected[layer_prefix(0) + "self_attn.o_proj.weight"][1]
    tensors = dict(expected)
    prunable = 0
    for layer, (heads, kv_heads) in enumerate(counts):
        prefix = layer_prefix(layer)
        for name, shape in attention_shapes(g, prefix, heads, kv_heads).items():
            if name.endswith("_proj.weight"):
                prunable += _elements(expected[name][0])
            tensors[name] = (shape, expected[name][1])
    dense, sliced = _sizes(expected, g, [(g.heads, g.kv_heads)] * g.layers, dtype), _sizes(tensors, g, counts, dtype)
    return SlicePlan(
        geometry=g,
        host=host,
        layout=layout,
        custom_code=custom,
        layers=layers,
        tensors=tensors,
        dense=dense,
        sliced=sliced,
        prunable_share=prunable / dense.parameters,
        runtimes=verdicts(g, host, counts),
    )


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _sizes(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], g: Geometry, counts: list[tuple[int, int]], dtype: str
) -> Sizes:
    kv_heads = sum(kv for _, kv in counts)
    return Sizes(
        parameters=sum(_elements(shape) for shape, _ in tensors.values()),
        weight_bytes=sum(_elements(shape) * dtype_bytes(kind) for shape, kind in tensors.values()),
        kv_bytes_per_token=2 * kv_heads * g.head_dim * dtype_bytes(dtype),
    )


def plan_json(plan: SlicePlan) -> dict[str, Any]:
    """The plan as plain data; the keys are promised to users (DESIGN section 5)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": plan.layout,
        "host": plan.host.architecture,
        "custom_code": plan.custom_code,
        "counts": [list(pair) for pair in plan.counts],
        "kept_heads": sum(heads for heads, _ in plan.counts),
        "total_heads": plan.geometry.total_heads,
        **{
            key: {"dense": getattr(plan.dense, key), "sliced": getattr(plan.sliced, key)}
            for key in ("parameters", "weight_bytes", "kv_bytes_per_token")
        },
        "prunable_share": plan.prunable_share,
        "runtimes": [
            {"runtime": verdict.runtime, "loads": verdict.loads, "reason": verdict.reason} for verdict in plan.runtimes
        ],
    }
