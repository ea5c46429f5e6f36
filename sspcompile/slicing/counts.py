"""What a decoder holds and computes, from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sspcompile.checkpoint.headers import dtype_bytes
from sspcompile.checkpoint.tensors import attention_shapes, layer_of, mlp_multiplied
from sspcompile.families import Geometry, layer_prefix
from sspcompile.slicing.measures import Tensors


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


def o_proj_of(layer: int) -> str:
    """The name of the matrix that takes the heads of a layer together."""
    return layer_prefix(layer) + "self_attn.o_proj.weight"


def sizes_by_layer(
    tensors: Tensors, g: Geometry, counts: Sequence[tuple[int, int]], widths: Sequence[int]
) -> list[Sizes]:
    """Of the layers whose `tensors` these are, with (query, key/value) head counts and widths of the MLPs per layer. A
    layer without heads has no attention, and one without channels too is removed whole.
    """
    parameters, weight_bytes = [0] * g.layers, [0] * g.layers
    for name, (shape, dtype) in tensors.items():
        layer = layer_of(name)
        if layer is not None:
            elements = math.prod(shape)
            parameters[layer] += elements
            weight_bytes[layer] += elements * dtype_bytes(dtype)
    # A cache holds what k_proj and v_proj put out, in their dtype.
    width = next(dtype_bytes(tensors[o_proj_of(layer)][1]) for layer, (heads, _) in enumerate(counts) if heads)
    found = []
    for layer, (heads, kv_heads) in enumerate(counts):
        if not widths[layer]:
            found.append(Sizes(0, 0, 0))
            continue
        shapes = attention_shapes(g, layer, heads, kv_heads) if heads else {}
        attention = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight"))
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


def sizes_of(tensors: Tensors, g: Geometry, layers: Iterable[Sizes]) -> Sizes:
    """Of the whole model, whose layers are counted already."""
    layers = list(layers)
    elements = {name: math.prod(shape) for name, (shape, _) in tensors.items()}
    return Sizes(
        parameters=sum(elements.values()),
        weight_bytes=sum(elements[name] * dtype_bytes(dtype) for name, (_, dtype) in tensors.items()),
        kv_bytes_per_token=sum(layer.kv_bytes_per_token for layer in layers),
        flops_per_token=sum(layer.flops_per_token for layer in layers) + 2 * g.vocab * g.hidden,
        flops_per_position=sum(layer.flops_per_position for layer in layers),
    )
