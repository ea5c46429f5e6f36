"""What the ONNX export has a graph for: one answer for `plan`, which asks before a build, and for `export`.

Each function returns what the graph is made of and raises UnsupportedModelError for what ONNX Runtime's kernels or the
graph cannot compute exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families.geometry import Geometry
from sspcompile.families.positions import Positions, rope_of
from sspcompile.families.table import FUSED_GATED, GATED, ONNX_FAMILIES
from sspcompile.families.windows import stray_window, turned_layers, windows_of

# Static position scalings: the frequencies do not depend on how long the text has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# ONNX Runtime's GroupQueryAttention fails for other head sizes when it runs, not when it is built.
HEAD_SIZE_MULTIPLE = 8
# What weights are read from.
FLOATS = ("F32", "F16", "BF16")
ACTIVATION = "silu"
Config = Mapping[str, Any]


@dataclass(frozen=True)
class GraphLayer:
    """One layer: its attention (none of no heads), and the channels of its MLP. `window`: how many keys a query sees,
    itself included; None for all before it.
    """

    heads: int
    kv_heads: int
    rotary: bool
    window: int | None
    width: int


def graph_refusal(config: Config, g: Geometry, dtypes: Collection[str]) -> str | None:
    """Why the export would refuse a cut of this model, whatever its head counts; None when it would not.

    `dtypes`: those that its tensors are stored in.
    """
    try:
        demand_graph(config, g, dtypes)
        graph_layers(config, g, ((g.heads, g.kv_heads),) * g.layers, (g.intermediate,) * g.layers)
        graph_positions(config, g)
    except (UnsupportedModelError, CheckpointError) as error:
        return error.message.removesuffix(".")
    return None


def demand_graph(config: Config, g: Geometry, dtypes: Collection[str]) -> None:
    """The parts of the model that are the same in every layer."""
    family = g.family
    if family.model_type not in ONNX_FAMILIES:
        raise UnsupportedModelError(
            f"The ONNX export does not know {family.architecture}.",
            hint=f"Accepted: {', '.join(ONNX_FAMILIES)}; --format hf takes every family.",
        )
    activation = config.get("hidden_act", family.silent["hidden_act"])
    if activation != ACTIVATION or family.mlp not in (GATED, FUSED_GATED):
        raise UnsupportedModelError(
            f"The ONNX export knows SwiGLU layers, not {activation!r:.60}.", hint="Use --format hf."
        )
    if config.get("is_causal", True) is not True:
        raise UnsupportedModelError(
            "The ONNX export attends to what comes before alone, and config.json has is_causal = "
            f"{config['is_causal']!r:.60}.",
            hint="Use --format hf.",
        )
    if key := stray_window(config, family):
        raise UnsupportedModelError(
            f"config.json has {key}, which {family.architecture} does not know and transformers' cache follows.",
            hint=f"Set {key} to null if the model has no sliding windows.",
        )
    if others := sorted(set(dtypes) - set(FLOATS)):
        raise UnsupportedModelError(
            f"The ONNX export reads {', '.join(FLOATS)}, and the model is stored as {others[0]}.",
            hint="Save it in one of these with transformers first.",
        )


def graph_layers(
    config: Config, g: Geometry, counts: Sequence[tuple[int, int]], widths: Sequence[int]
) -> tuple[GraphLayer, ...]:
    """Every layer with its (query, key/value) head counts and the width of its MLP."""
    turned = turned_layers(config, g.family, g.layers)
    windows = windows_of(config, g.family, g.layers)
    layers = tuple(
        GraphLayer(heads, kv_heads, rotary, window, width)
        for (heads, kv_heads), rotary, window, width in zip(counts, turned, windows, widths, strict=True)
    )
    if g.head_dim % HEAD_SIZE_MULTIPLE:
        raise UnsupportedModelError(
            f"ONNX Runtime attends over head sizes that are multiples of {HEAD_SIZE_MULTIPLE}, not {g.head_dim}.",
            hint="Use --format hf.",
        )
    for index, layer in enumerate(layers):
        if layer.heads and layer.heads % layer.kv_heads:
            raise UnsupportedModelError(
                f"Layer {index} has {layer.heads} query heads for {layer.kv_heads} key/value heads.",
                hint="Build the artifact again.",
            )
    return layers


def graph_positions(config: Config, g: Geometry) -> Positions:
    """The rotary positions of every layer that has them."""
    rope = rope_of(config, g.family)
    partial = rope.parameters.get("partial_rotary_factor", 1.0) != 1.0
    if rope.kind not in ROPE_TYPES or partial:
        what = "rotary positions on a part of the head" if rope.kind in ROPE_TYPES else f"{rope.kind!r} positions"
        raise UnsupportedModelError(
            f"The ONNX export cannot compute {what} exactly.",
            hint=f"Accepted: {', '.join(ROPE_TYPES)} on whole heads; --format hf takes every kind.",
        )
    return rope
