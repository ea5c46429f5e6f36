"""SlicePlan: what a mask does to a checkpoint, worked out from headers or from the configuration alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sspcompile.checkpoint.headers import dtype_bytes
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import attention_shapes, mlp_multiplied, mlp_shapes
from sspcompile.errors import ArtifactError, CheckpointError, UnsupportedModelError
from sspcompile.families import (
    Family,
    Geometry,
    GgufModel,
    Host,
    geometry_of,
    gguf_model,
    graph_refusal,
    hosted_config,
    layer_prefix,
)
from sspcompile.slicing.hosts import per_layer_host, uniform_host
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import HeadMask, Layout, check_mask, kept_of
from sspcompile.slicing.runtimes import Verdict, verdicts
from sspcompile.slicing.sizes import channel_parameters, choose_per_layer, even_worth, uniform_sizes

SCHEMA_VERSION = 1
Tensors = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class LayerCut:
    """Kept query heads and kept key/value heads of one layer, ascending indices of the dense model.

    `dummy`: the layer lost all its heads; head 0 stays as the portable form of "no attention", its o_proj columns zero.
    `channels`: kept channels of the MLP, ascending; None for all of them.
    """

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    dummy: bool = False
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sizes:
    """`parameters` counts elements, tied weights once; bytes as stored. KV bytes: 2 * kv heads * head_dim * bytes.

    `flops_per_token`: 2 for every element of a matrix that one token is multiplied with (the output matrix included,
    the embedding not, of the experts only those it visits). `flops_per_position`: what attention adds to it for every
    position of the context, 4 * query heads * head_dim (scores and values).
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int = 0
    flops_per_position: int = 0


@dataclass(frozen=True)
class SlicePlan:
    """Everything about the cut except the weights. `tensors`: output name -> (shape, dtype), in the source's order.

    `host` is the family of the class that loads the result, `settings` what its configuration must say; `custom_code`
    says that no stock class can state the counts, so that the class travels in the folder. `by_layer` has
    (dense, sliced) of every layer, its MLP and norms included.
    """

    geometry: Geometry
    host: Family
    settings: Mapping[str, Any]
    layout: Layout
    custom_code: bool
    layers: tuple[LayerCut, ...]
    tensors: Tensors
    dense: Sizes
    sliced: Sizes
    by_layer: tuple[tuple[Sizes, Sizes], ...]
    prunable_share: float
    runtimes: tuple[Verdict, ...]

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """(query heads, key/value heads) of every layer after the cut."""
        return tuple((len(layer.heads), len(layer.groups)) for layer in self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every layer's MLP after the cut."""
        whole = self.geometry.intermediate
        return tuple(whole if layer.channels is None else len(layer.channels) for layer in self.layers)

    @property
    def size(self) -> float:
        """What is left of all parameters, as a share."""
        return self.sliced.parameters / self.dense.parameters

    @property
    def channel_share(self) -> float:
        """The share of the dense parameters that belongs to channels of the MLPs; 0 where none can be cut."""
        g = self.geometry
        channels = g.layers * g.intermediate * channel_parameters(g) if g.has_channels else 0
        return channels / self.dense.parameters

    @property
    def keeps_everything(self) -> bool:
        """Whether the result is the source: every unit, in its own class."""
        return self._all_units and self.host is self.geometry.family

    @property
    def _all_units(self) -> bool:
        g = self.geometry
        return (
            set(self.counts) == {(g.heads, g.kv_heads)}
            and set(self.widths) == {g.intermediate}
            and not any(layer.dummy for layer in self.layers)
        )


def make_plan(checkpoint: Checkpoint, mask: HeadMask, *, host: str | None = None) -> SlicePlan:
    """Plan the cut of `mask` out of `checkpoint`, for the class of the family `host` (None: the best one).

    Raises ArtifactError when they do not fit each other, UnsupportedModelError when no class holds the result, and
    InputError when `host` does not.
    """
    g = checkpoint.geometry
    check_mask(mask, empty_layers=True)
    if (mask.layers, mask.heads, mask.kv_heads) != (g.layers, g.heads, g.kv_heads):
        raise ArtifactError(
            f"The mask is for {mask.layers} layers of {mask.heads} heads ({mask.kv_heads} kv); the model has "
            f"{g.layers} of {g.heads} ({g.kv_heads} kv).",
            hint="Compile a mask for this model with `sspcompile build`.",
        )
    if mask.channels is not None:
        _demand_channels(g, mask)
    rows = mask.channels or (None,) * g.layers
    layers = tuple(
        LayerCut(kept or (0,), mask.kept_groups(layer) or (0,), dummy=not kept, channels=channels)
        for layer, (kept, channels) in enumerate(zip(mask.kept, rows, strict=True))
    )
    return _plan(checkpoint, layers, mask.layout, host)


def _demand_channels(g: Geometry, mask: HeadMask) -> None:
    if not g.has_channels:
        raise UnsupportedModelError(
            f"The channels of the experts of {g.family.architecture} cannot be cut.",
            hint="Give a budget of heads alone, such as --keep 0.75.",
        )
    if mask.intermediate != g.intermediate:
        raise ArtifactError(
            f"The mask is for MLPs of {mask.intermediate} channels; the model has {g.intermediate}.",
            hint="Compile a mask for this model with `sspcompile build`.",
        )


def plan_counts(
    checkpoint: Checkpoint, keep: float, layout: Layout, *, host: str | None = None, groups_only: bool = False
) -> SlicePlan:
    """Plan by head counts alone, for a model whose scores are not known: every head counts the same.

    The sizes are those of any mask with these counts; which heads stay is left open. Raises BudgetError.
    """
    g = checkpoint.geometry
    choice = choose(np.ones((g.layers, g.heads)), g.kv_heads, keep, layout, groups_only=groups_only)
    return _plan(checkpoint, _cuts(g, choice), layout, host)


def plan_size(
    checkpoint: Checkpoint,
    size: float,
    layout: Layout,
    *,
    channels: bool,
    host: str | None = None,
    groups_only: bool = False,
) -> SlicePlan:
    """As `plan_counts`, for a share of all parameters; `channels`: whether those of the MLPs may go beside heads.

    The same share of heads and of channels goes, as far as their steps allow. Raises BudgetError.
    """
    g = checkpoint.geometry
    worth = even_worth(g, channels=channels)
    if layout == "per-layer":
        choice = choose_per_layer(worth, g, size, groups_only=groups_only)
        return _plan(checkpoint, _cuts(g, choice), layout, host)
    choices = uniform_sizes(worth, g, size, groups_only=groups_only)
    for choice in choices[:-1]:
        with contextlib.suppress(UnsupportedModelError):  # another shape may fit a class
            return _plan(checkpoint, _cuts(g, choice), layout, host)
    return _plan(checkpoint, _cuts(g, choices[-1]), layout, host)


def _cuts(g: Geometry, choice: Choice) -> tuple[LayerCut, ...]:
    rows = (None,) * g.layers if choice.channels is None or choice.channels.all() else kept_of(choice.channels)
    return tuple(
        LayerCut(kept, tuple(sorted({head // g.group_size for head in kept})), channels=channels)
        for kept, channels in zip(kept_of(choice.kept), rows, strict=True)
    )


def host_of(
    geometry: Geometry,
    shapes: Sequence[tuple[int, int]],
    wanted: str | None = None,
    *,
    layout: Layout = "uniform",
    widths: Sequence[int] = (),
) -> Host:
    """The class that holds layers of these shapes (groups, heads per group) and widths of their MLPs, custom or stock.

    The `layout` per-layer asks for the custom class where layers of one shape fit no stock class. Raises
    UnsupportedModelError when there is none, and InputError when the one `wanted` cannot.
    """
    return _placed(geometry, shapes, widths, wanted, layout)[0]


def _placed(
    geometry: Geometry, shapes: Sequence[tuple[int, int]], widths: Sequence[int], wanted: str | None, layout: Layout
) -> tuple[Host, bool]:
    """The class, and whether it is the custom one."""
    if len(set(shapes)) > 1 or len(set(widths)) > 1:
        return per_layer_host(geometry, wanted), True
    try:
        return uniform_host(geometry, shapes[0][0] * shapes[0][1], wanted), False
    except UnsupportedModelError:
        if layout == "uniform":
            raise
        return per_layer_host(geometry), True


def _plan(checkpoint: Checkpoint, layers: tuple[LayerCut, ...], layout: Layout, wanted: str | None) -> SlicePlan:
    g = checkpoint.geometry
    counts = [(len(layer.heads), len(layer.groups)) for layer in layers]
    shapes = tuple((kv_heads, heads // kv_heads) for heads, kv_heads in counts)
    widths = [g.intermediate if layer.channels is None else len(layer.channels) for layer in layers]
    host, custom_code = _placed(g, shapes, widths, wanted, layout)
    expected = checkpoint.expected()
    dtypes = {dtype for _, dtype in expected.values()}
    tensors, prunable = dict(expected), 0
    hosted = replace(g, qkv_bias=g.qkv_bias or "qkv" in host.zero_biases, o_bias=g.o_bias or "o" in host.zero_biases)
    for layer, (heads, kv_heads) in enumerate(counts):
        dtype = expected[_o_proj(layer)][1]
        for name, shape in attention_shapes(hosted, layer, heads, kv_heads).items():
            if name.endswith("_proj.weight"):
                prunable += math.prod(expected[name][0])
            tensors[name] = (shape, expected[name][1] if name in expected else dtype)
        if layers[layer].channels is not None:
            tensors |= {name: (shape, expected[name][1]) for name, shape in mlp_shapes(g, layer, widths[layer]).items()}
    dense_counts = [(g.heads, g.kv_heads)] * g.layers
    dense = _by_layer(expected, g, dense_counts, [g.intermediate] * g.layers)
    sliced = _by_layer(tensors, g, counts, widths)
    dense_total, sliced_total = _total(expected, g, dense), _total(tensors, g, sliced)
    return SlicePlan(
        geometry=g,
        host=host.family,
        settings=host.settings,
        layout=layout,
        custom_code=custom_code,
        layers=layers,
        tensors=tensors,
        dense=dense_total,
        sliced=sliced_total,
        by_layer=tuple(zip(dense, sliced, strict=True)),
        prunable_share=prunable / dense_total.parameters,
        runtimes=verdicts(
            g,
            host.family,
            counts,
            widths,
            custom=custom_code,
            onnx=graph_refusal(checkpoint.config, g, dtypes),
            gguf=_gguf(checkpoint, host, counts, widths, dtypes),
        ),
    )


def _gguf(
    checkpoint: Checkpoint,
    host: Host,
    counts: Sequence[tuple[int, int]],
    widths: Sequence[int],
    dtypes: Collection[str],
) -> GgufModel | str:
    """How the GGUF export writes the cut, which it reads as its host's; or why it refuses it."""
    config = hosted_config(checkpoint.config, checkpoint.geometry, host)
    try:
        hosted = replace(geometry_of(config), tied=checkpoint.geometry.tied)
        return gguf_model(config, hosted, counts, widths, dtypes)
    except (UnsupportedModelError, CheckpointError) as error:
        return error.message.removesuffix(".")


def _o_proj(layer: int) -> str:
    return layer_prefix(layer) + "self_attn.o_proj.weight"


def _by_layer(tensors: Tensors, g: Geometry, counts: Sequence[tuple[int, int]], widths: Sequence[int]) -> list[Sizes]:
    parameters, weight_bytes = [0] * g.layers, [0] * g.layers
    stem = layer_prefix(0).removesuffix("0.")
    for name, (shape, dtype) in tensors.items():
        if name.startswith(stem):
            layer = int(name.removeprefix(stem).partition(".")[0])
            elements = math.prod(shape)
            parameters[layer] += elements
            weight_bytes[layer] += elements * dtype_bytes(dtype)
    # A cache holds what k_proj and v_proj put out, in their dtype.
    width = dtype_bytes(tensors[_o_proj(0)][1])
    found = []
    for layer, (heads, kv_heads) in enumerate(counts):
        attention = sum(
            math.prod(shape)
            for name, shape in attention_shapes(g, layer, heads, kv_heads).items()
            if name.endswith("_proj.weight")
        )
        found.append(
            Sizes(
                parameters=parameters[layer],
                weight_bytes=weight_bytes[layer],
                kv_bytes_per_token=2 * kv_heads * g.head_dim * width,
                flops_per_token=2 * (attention + mlp_multiplied(g, layer, widths[layer])),
                flops_per_position=4 * heads * g.head_dim,
            )
        )
    return found


def _total(tensors: Tensors, g: Geometry, layers: Iterable[Sizes]) -> Sizes:
    layers = list(layers)
    elements = {name: math.prod(shape) for name, (shape, _) in tensors.items()}
    return Sizes(
        parameters=sum(elements.values()),
        weight_bytes=sum(elements[name] * dtype_bytes(dtype) for name, (_, dtype) in tensors.items()),
        kv_bytes_per_token=sum(layer.kv_bytes_per_token for layer in layers),
        flops_per_token=sum(layer.flops_per_token for layer in layers) + 2 * g.vocab * g.hidden,
        flops_per_position=sum(layer.flops_per_position for layer in layers),
    )


SIZE_KEYS = ("parameters", "weight_bytes", "kv_bytes_per_token", "flops_per_token", "flops_per_position")


def _pairs(dense: Sizes, sliced: Sizes) -> dict[str, dict[str, int]]:
    return {key: {"dense": getattr(dense, key), "sliced": getattr(sliced, key)} for key in SIZE_KEYS}


def _degrees(verdict: Verdict) -> dict[str, dict[str, Any]]:
    return {str(n): {"loads": not reason, "reason": reason} for n, reason in verdict.tensor_parallel.items()}


def plan_json(plan: SlicePlan) -> dict[str, Any]:
    """The plan as plain data; the keys are promised to users."""
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": plan.layout,
        "host": plan.host.architecture,
        "custom_code": plan.custom_code,
        "counts": [list(pair) for pair in plan.counts],
        "kept_heads": sum(heads for heads, _ in plan.counts),
        "total_heads": plan.geometry.total_heads,
        "widths": list(plan.widths),
        "dense_width": plan.geometry.intermediate,
        "dummy_layers": [index for index, layer in enumerate(plan.layers) if layer.dummy],
        **_pairs(plan.dense, plan.sliced),
        "prunable_share": plan.prunable_share,
        "layers": [
            {"heads": heads, "kv_heads": kv_heads, **_pairs(dense, sliced)}
            for (heads, kv_heads), (dense, sliced) in zip(plan.counts, plan.by_layer, strict=True)
        ],
        "runtimes": [
            {
                "runtime": verdict.runtime,
                "loads": verdict.loads,
                "reason": verdict.reason,
                **({"tensor_parallel": _degrees(verdict)} if verdict.tensor_parallel else {}),
            }
            for verdict in plan.runtimes
        ],
    }
