"""SlicePlan: what a mask does to a checkpoint, worked out from headers or from the configuration alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import attention_shapes, moved
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
    shallower,
    without_layers,
)
from sspcompile.families.windows import windows_of
from sspcompile.request.options import WHOLE_LAYOUTS, Whole
from sspcompile.slicing.counts import Sizes, sizes_by_layer, sizes_of
from sspcompile.slicing.depth import any_layers
from sspcompile.slicing.hosts import per_layer_host, uniform_host
from sspcompile.slicing.layouts import GONE, SILENT, choose
from sspcompile.slicing.left import REMOVED, LayerCut, cuts_of, tensors_left, widths_left
from sspcompile.slicing.mask import HeadMask, Layout, check_mask
from sspcompile.slicing.measures import Serving, Tensors, tokens_held
from sspcompile.slicing.runtimes import Verdict, verdicts
from sspcompile.slicing.sizes import (
    EXPERT_STEP,
    Bounds,
    channel_parameters,
    choose_per_layer,
    even_worth,
    realised,
    uniform_ranked,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SlicePlan:
    """Everything about the cut except the weights. `layers` are those of the dense model, removed ones among them.
    `tensors`: output name -> (shape, dtype), in the source's order; the layers that stay are numbered from 0 again, and
    `sources` has the source's name of each.

    `host` is the family of the class that loads the result, `settings` what its configuration must say; `custom_code`
    says that no stock class can state the counts, so that the class travels in the folder. `by_layer` has
    (dense, sliced) of every layer, its MLP and norms included. `windows`: by layer how many keys a query sees, None
    for all.
    """

    geometry: Geometry
    host: Family
    settings: Mapping[str, Any]
    layout: Layout
    custom_code: bool
    layers: tuple[LayerCut, ...]
    tensors: Tensors
    sources: Mapping[str, str]
    dense: Sizes
    sliced: Sizes
    by_layer: tuple[tuple[Sizes, Sizes], ...]
    prunable_share: float
    runtimes: tuple[Verdict, ...]
    windows: tuple[int | None, ...]

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """(query heads, key/value heads) of every layer of the dense model after the cut; (0, 0) of a layer that is
        removed, or has lost its attention.
        """
        return tuple((len(layer.heads), len(layer.groups)) for layer in self.layers)

    @property
    def staying(self) -> tuple[int, ...]:
        """The layers that are written, ascending: where they stand in the dense model."""
        return tuple(index for index, layer in enumerate(self.layers) if not layer.removed)

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers that go whole."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.removed)

    @property
    def silent(self) -> tuple[int, ...]:
        """The layers that stay without their attention."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.shape == SILENT)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each MLP (or expert) of every layer after the cut; 0 of a removed layer."""
        return tuple(widths_left(self.geometry, self.layers))

    @property
    def size(self) -> float:
        """What is left of all parameters, as a share."""
        return self.sliced.parameters / self.dense.parameters

    def memory(self, serving: Serving) -> tuple[int, int]:
        """Bytes of weights and KV cache, (dense, sliced); a layer with a sliding window caches no more of it."""
        held = [serving.batch * tokens for tokens in tokens_held(self.windows, serving)]
        dense, sliced = (
            sum(tokens * sizes.kv_bytes_per_token for tokens, sizes in zip(held, layers, strict=True))
            for layers in zip(*self.by_layer, strict=True)
        )
        return self.dense.weight_bytes + dense, self.sliced.weight_bytes + sliced

    @property
    def channel_share(self) -> float:
        """The share of the dense parameters that belongs to channels of the MLPs; 0 where none can be cut."""
        g = self.geometry
        channels = g.layers * g.width * channel_parameters(g) if g.has_channels else 0
        return channels / self.dense.parameters

    @property
    def keeps_everything(self) -> bool:
        """Whether the result is the source: every unit, in its own class."""
        return self._all_units and self.host is self.geometry.family

    @property
    def _all_units(self) -> bool:
        g = self.geometry
        return set(self.counts) == {(g.heads, g.kv_heads)} and set(self.widths) == {g.width}


def make_plan(checkpoint: Checkpoint, mask: HeadMask, *, host: str | None = None) -> SlicePlan:
    """Plan the cut of `mask` out of `checkpoint`, for the class of the family `host` (None: the best one).

    Raises ArtifactError when they do not fit each other, UnsupportedModelError when no class holds the result, and
    InputError when `host` does not.
    """
    g = checkpoint.geometry
    check_mask(mask)
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
        REMOVED if layer in mask.removed else LayerCut(kept, mask.kept_groups(layer), channels=channels)
        for layer, (kept, channels) in enumerate(zip(mask.kept, rows, strict=True))
    )
    return _plan(checkpoint, layers, mask.layout, host)


def _demand_channels(g: Geometry, mask: HeadMask) -> None:
    if not g.has_channels:
        raise UnsupportedModelError(
            f"This {g.family.architecture} has experts in some layers and one MLP in others: no channels are cut.",
            hint="Give a budget of heads alone, such as --keep 0.75.",
        )
    if (mask.experts, mask.intermediate) != (g.mlps, g.width):
        raise ArtifactError(
            f"The mask is for {_mlps(mask.experts, mask.intermediate)}; the model has {_mlps(g.mlps, g.width)}.",
            hint="Compile a mask for this model with `sspcompile build`.",
        )
    odd = [width for width in mask.widths or () if width % EXPERT_STEP and width != g.width]
    if odd and not g.is_dense:
        raise ArtifactError(
            f"The mask leaves experts of {odd[0]} channels, which kernels that run all experts at once do not take.",
            hint=f"Keep a multiple of {EXPERT_STEP} channels in every expert.",
        )


def _mlps(experts: int, width: int) -> str:
    return f"MLPs of {width} channels" if experts == 1 else f"{experts} experts of {width} channels in every layer"


def plan_counts(
    checkpoint: Checkpoint, keep: float, layout: Layout, *, host: str | None = None, groups_only: bool = False
) -> SlicePlan:
    """Plan by head counts alone, for a model whose scores are not known: every head counts the same.

    The sizes are those of any mask with these counts; which heads stay is left open. Raises BudgetError.
    """
    g = checkpoint.geometry
    choice = choose(np.ones((g.layers, g.heads)), g.kv_heads, keep, layout, groups_only=groups_only)
    return _plan(checkpoint, cuts_of(g, choice), layout, host)


def plan_within(
    checkpoint: Checkpoint,
    bounds: Bounds,
    layout: Layout,
    *,
    channels: bool,
    whole: Whole | None = None,
    host: str | None = None,
    groups_only: bool = False,
) -> SlicePlan:
    """As `plan_counts`, within bounds on parameters, memory or time; `channels`: whether those of the MLPs may go
    beside heads; `whole`: layers, or their attention, go whole and nothing else does.

    Of parameters, the same share of heads and of channels goes, as far as their steps allow. Raises BudgetError.
    """
    g = checkpoint.geometry
    if whole is not None:
        return _plan(checkpoint, cuts_of(g, any_layers(g, bounds, whole)), WHOLE_LAYOUTS[whole], host)
    worth = even_worth(g, channels=channels)
    if layout == "per-layer":
        choice = choose_per_layer(worth, g, bounds, groups_only=groups_only)
        return _plan(checkpoint, cuts_of(g, choice), layout, host)
    every = uniform_ranked(worth, g, bounds, groups_only=groups_only)
    for counts in every[:-1]:
        with contextlib.suppress(UnsupportedModelError):  # another shape may fit a class
            return _plan(checkpoint, cuts_of(g, realised(worth, g, counts, per_layer=False)), layout, host)
    return _plan(checkpoint, cuts_of(g, realised(worth, g, every[-1], per_layer=False)), layout, host)


def host_of(
    geometry: Geometry,
    shapes: Sequence[tuple[int, int]],
    wanted: str | None = None,
    *,
    layout: Layout = "uniform",
    widths: Sequence[int] = (),
) -> Host:
    """The class that holds layers of these shapes (groups, heads per group) and widths of their MLPs, custom or stock.
    Layers that are removed whole do not count, and no stock class has layers without attention.

    The `layout` per-layer asks for the custom class where layers of one shape fit no stock class. Raises
    UnsupportedModelError when there is none, and InputError when the one `wanted` cannot.
    """
    return _placed(geometry, shapes, widths, wanted, layout)[0]


def _placed(
    geometry: Geometry, shapes: Sequence[tuple[int, int]], widths: Sequence[int], wanted: str | None, layout: Layout
) -> tuple[Host, bool]:
    """The class, and whether it is the custom one."""
    there = [shape != GONE for shape in shapes]
    shapes, widths = [*compress(shapes, there)], [*compress(widths, there)]
    if len(set(shapes)) > 1 or len(set(widths)) > 1 or SILENT in shapes:
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
    shapes = tuple(layer.shape for layer in layers)
    widths = widths_left(g, layers)
    staying = [index for index, layer in enumerate(layers) if not layer.removed]
    host, custom_code = _placed(g, shapes, widths, wanted, layout)
    expected = checkpoint.expected()
    dtypes = {dtype for _, dtype in expected.values()}
    tensors = tensors_left(g, layers, host, expected)
    places = {layer: place for place, layer in enumerate(staying)}
    names = {moved(name, places): name for name in tensors}
    config = without_layers(checkpoint.config, g, staying)
    written = [counts[layer] for layer in staying], [widths[layer] for layer in staying]
    dense_counts = [(g.heads, g.kv_heads)] * g.layers
    dense = sizes_by_layer(expected, g, dense_counts, [g.width] * g.layers)
    sliced = sizes_by_layer(tensors, g, counts, widths)
    dense_total, sliced_total = sizes_of(expected, g, dense), sizes_of(tensors, g, sliced)
    return SlicePlan(
        geometry=g,
        host=host.family,
        settings=host.settings,
        layout=layout,
        custom_code=custom_code,
        layers=layers,
        tensors={name: tensors[source] for name, source in names.items()},
        sources=names,
        dense=dense_total,
        sliced=sliced_total,
        by_layer=tuple(zip(dense, sliced, strict=True)),
        prunable_share=_prunable(g, expected) / dense_total.parameters,
        runtimes=verdicts(
            g,
            host.family,
            *written,
            custom=custom_code,
            onnx=graph_refusal(config, shallower(g, staying), dtypes),
            gguf=_gguf(config, g, host, *written, dtypes),
        ),
        windows=windows_of(checkpoint.config, g.family, g.layers),
    )


def _prunable(g: Geometry, expected: Tensors) -> int:
    """Parameters of all projections of attention."""
    names = (name for layer in range(g.layers) for name in attention_shapes(g, layer, g.heads, g.kv_heads))
    return sum(math.prod(expected[name][0]) for name in names if name.endswith("_proj.weight"))


def _gguf(
    source: Mapping[str, Any],
    g: Geometry,
    host: Host,
    counts: Sequence[tuple[int, int]],
    widths: Sequence[int],
    dtypes: Collection[str],
) -> GgufModel | str:
    """How the GGUF export writes the cut, which it reads as its host's; or why it refuses it."""
    config = hosted_config(source, g, host)
    try:
        hosted = replace(geometry_of(config), tied=g.tied)
        return gguf_model(config, hosted, counts, widths, dtypes)
    except (UnsupportedModelError, CheckpointError) as error:
        return error.message.removesuffix(".")


SIZE_KEYS = ("parameters", "weight_bytes", "kv_bytes_per_token", "flops_per_token", "flops_per_position")


def _pairs(dense: Sizes, sliced: Sizes) -> dict[str, dict[str, int]]:
    return {key: {"dense": getattr(dense, key), "sliced": getattr(sliced, key)} for key in SIZE_KEYS}


def _degrees(verdict: Verdict) -> dict[str, dict[str, Any]]:
    return {str(n): {"loads": not reason, "reason": reason} for n, reason in verdict.tensor_parallel.items()}


def plan_json(plan: SlicePlan, serving: Serving | None = None) -> dict[str, Any]:
    """The plan as plain data, with the bytes that it takes while it serves; the keys are promised to users."""
    memory = {}
    if serving is not None:
        dense, sliced = plan.memory(serving)
        memory = {"memory": {"dense": dense, "sliced": sliced, **asdict(serving)}}
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": plan.layout,
        "host": plan.host.architecture,
        "custom_code": plan.custom_code,
        "counts": [list(pair) for pair in plan.counts],
        "kept_heads": sum(heads for heads, _ in plan.counts),
        "total_heads": plan.geometry.total_heads,
        "widths": list(plan.widths),
        "dense_width": plan.geometry.width,
        **({"experts": plan.geometry.mlps} if plan.geometry.mlps > 1 else {}),
        **({"removed_layers": [*plan.removed]} if plan.removed else {}),
        **({"removed_attention": [*plan.silent]} if plan.silent else {}),
        **_pairs(plan.dense, plan.sliced),
        **memory,
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
