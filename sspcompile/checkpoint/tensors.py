"""Names and shapes of a decoder's tensors, and which part of each belongs to which unit, from the geometry alone.

Rows of q/k/v and columns of o belong to heads: head h owns q_proj rows h*D .. (h+1)*D and the same columns of o_proj;
key/value head g owns k_proj and v_proj rows g*D .. (g+1)*D (D = head_dim). A fused qkv_proj stacks q, k and v.
Channel c of an MLP owns row c of the matrices that read the residual stream (gate and up, one above the other where
they are fused) and column c of the one that writes into it. Of experts each is such an MLP; the channels of a layer are
those of all its experts, one expert behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sspcompile.families import Geometry, Linear, layer_prefix

Shapes = dict[str, tuple[int, ...]]


class Blocks(NamedTuple):
    """What stays of a tensor: blocks of `size` rows (axis 0) or columns (axis 1), by their ascending numbers."""

    axis: int
    kept: tuple[int, ...]
    size: int


DECODER = "model."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head.weight"
# A sparse MLP as transformers 5 holds it in memory, whatever the family calls its parts on disk.
SPARSE_MLP = "mlp."
ROUTER, EXPERTS_GATE_UP, EXPERTS_DOWN = "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for one of no layer."""
    stem = layer_prefix(0).removesuffix("0.")
    number = name.removeprefix(stem).partition(".")[0] if name.startswith(stem) else ""
    return int(number) if number.isascii() and number.isdigit() else None


def moved(name: str, places: Mapping[int, int]) -> str:
    """The name of a tensor whose layer got another number, by `places`; of one of no layer its own."""
    layer = layer_of(name)
    return name if layer is None else layer_prefix(places[layer]) + name.removeprefix(layer_prefix(layer))


def size_of(g: Geometry, name: str) -> int:
    """A size by its name in the family table."""
    return 2 * g.intermediate if name == "twice_intermediate" else int(getattr(g, name))


def tensor_shapes(g: Geometry) -> Shapes:
    """Name -> shape of every tensor of the dense checkpoint."""
    shapes: Shapes = {EMBEDDING: (g.vocab, g.hidden)}
    for layer in range(g.layers):
        shapes |= attention_shapes(g, layer, g.heads, g.kv_heads)
        shapes |= mlp_shapes(g, layer)
        for norm in g.family.norms:
            shapes |= _norm(g, layer_prefix(layer) + norm)
    shapes |= _norm(g, FINAL_NORM)
    if not g.tied:
        shapes[LM_HEAD] = (g.vocab, g.hidden)
    return shapes


def attention_shapes(g: Geometry, layer: int, heads: int, kv_heads: int) -> Shapes:
    """Name -> shape of one layer's attention tensors with `heads` query and `kv_heads` key/value heads."""
    a = layer_prefix(layer) + "self_attn."
    q, kv = heads * g.head_dim, kv_heads * g.head_dim
    rows = {"qkv_proj": q + 2 * kv} if g.family.fused_qkv else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    shapes: Shapes = {f"{a}{name}.weight": (count, g.hidden) for name, count in rows.items()}
    shapes[a + "o_proj.weight"] = (g.hidden, q)
    if g.qkv_bias:
        shapes |= {f"{a}{name}.bias": (count,) for name, count in rows.items()}
    if g.o_bias:
        shapes[a + "o_proj.bias"] = (g.hidden,)
    if g.family.qk_norm:
        shapes |= {a + "q_norm.weight": (g.head_dim,), a + "k_norm.weight": (g.head_dim,)}
    return shapes


def of_attention(g: Geometry, name: str) -> bool:
    """Whether a tensor belongs to the attention of a layer: its matrices, its norms, and the norms around it."""
    layer = layer_of(name)
    if layer is None:
        return False
    part = name.removeprefix(layer_prefix(layer))
    return part.startswith("self_attn.") or part.rpartition(".")[0] in g.family.attention_norms


def attention_blocks(g: Geometry, layer: int, heads: Sequence[int], groups: Sequence[int]) -> dict[str, Blocks]:
    """Tensor name -> what stays of it with these query heads and key/value heads."""
    a = layer_prefix(layer) + "self_attn."
    heads, groups = tuple(heads), tuple(groups)
    if g.family.fused_qkv:
        keys = tuple(g.heads + group for group in groups)
        values = tuple(g.heads + g.kv_heads + group for group in groups)
        rows = {"qkv_proj": (*heads, *keys, *values)}
    else:
        rows = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    size = g.head_dim
    blocks = {f"{a}{name}.{kind}": Blocks(0, kept, size) for name, kept in rows.items() for kind in ("weight", "bias")}
    return {**blocks, a + "o_proj.weight": Blocks(1, heads, size)}


def channel_blocks(g: Geometry, layer: int, channels: Sequence[int]) -> dict[str, Blocks]:
    """Tensor name -> what stays of it with these channels of the layer's MLP, or of its experts."""
    blocks: dict[str, Blocks] = {}
    for number, kept in enumerate(by_mlp(g, channels)):
        both = (*kept, *(g.width + channel for channel in kept))
        for linear in mlp_parts(g, layer, number):
            if linear.rows == "hidden":
                blocks[f"{linear.name}.weight"] = Blocks(1, kept, 1)
            else:
                rows = both if linear.rows == "twice_intermediate" else kept
                blocks |= {f"{linear.name}.{kind}": Blocks(0, rows, 1) for kind in ("weight", "bias")}
    return blocks


def by_mlp(g: Geometry, channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Channels of a layer as those of each of its MLPs, counted from 0 in each; the order stays."""
    numbers, places = np.divmod(np.array(channels, dtype=np.int64), g.width)
    ends = np.cumsum(np.bincount(numbers, minlength=g.mlps))[:-1]
    return [tuple(part.tolist()) for part in np.split(places[np.argsort(numbers, kind="stable")], ends)]


def mlp_parts(g: Geometry, layer: int, number: int) -> list[Linear]:
    """The matrices of one MLP of a layer under their whole names: of an expert, or with number 0 of the only one."""
    prefix, parts = layer_prefix(layer), g.family.mlp
    if layer in g.sparse and g.family.experts is not None:
        prefix += g.family.experts.expert.format(number) + "."
        parts = g.family.experts.parts
    return [replace(linear, name=prefix + linear.name) for linear in parts]


def down_names(g: Geometry, layer: int) -> list[str]:
    """The names of the matrices that a layer's MLPs write with: one, or one of every expert."""
    numbers = range(g.experts if layer in g.sparse else 1)
    parts = (part for number in numbers for part in mlp_parts(g, layer, number))
    return [f"{part.name}.weight" for part in parts if part.rows == "hidden"]


def mlp_shapes(g: Geometry, layer: int, width: int | None = None) -> Shapes:
    """Name -> shape of one layer's MLP: matrices of `width` channels (None: all), or router and experts of that."""
    return {name: shape for name, shape, _ in _mlp(_narrowed(g, width), layer)}


def _narrowed(g: Geometry, width: int | None) -> Geometry:
    """With MLPs, or experts, of another width; as it is where a configuration has both, of which none is cut."""
    if width is None or not g.has_channels:
        return g
    return replace(g, intermediate=width) if g.is_dense else replace(g, expert_intermediate=width)


def mlp_multiplied(g: Geometry, layer: int, width: int | None = None) -> int:
    """Elements of the MLP matrices that one token is multiplied with: of the experts, only those it visits."""
    g = _narrowed(g, width)
    experts = g.experts if layer in g.sparse else 1
    visited = g.active_experts if layer in g.sparse else 1
    weights = [(shape, shared) for name, shape, shared in _mlp(g, layer) if name.endswith(".weight")]
    always = sum(shape[0] * shape[1] for shape, shared in weights if shared)
    return always + sum(shape[0] * shape[1] for shape, shared in weights if not shared) // experts * visited


def _mlp(g: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether every token visits it)."""
    if layer not in g.sparse or g.family.experts is None:
        for linear in mlp_parts(g, layer, 0):
            shape = linear_shape(g, linear)
            yield f"{linear.name}.weight", shape, True
            if g.mlp_bias:
                yield f"{linear.name}.bias", shape[:1], True
        return
    yield f"{layer_prefix(layer)}{g.family.experts.router}.weight", (g.experts, g.hidden), True
    for number in range(g.experts):
        for linear in mlp_parts(g, layer, number):
            yield f"{linear.name}.weight", linear_shape(g, linear), False


def linear_shape(g: Geometry, linear: Linear) -> tuple[int, int]:
    """[rows, columns] of one matrix of an MLP."""
    return size_of(g, linear.rows), size_of(g, linear.columns)


def _norm(g: Geometry, name: str) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (g.hidden,)}
    if g.family.norm_bias:
        shapes[f"{name}.bias"] = (g.hidden,)
    return shapes
