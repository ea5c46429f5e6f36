"""The graph of a decoder for ONNX Runtime, node by node; weights are references into files.

Inputs `input_ids` [B, S], `attention_mask` [B, T] (int64; ones at the last S columns that are read, zeros at padding)
and `past_key_values.N.key/value` [B, kv heads, P, D], N counting the layers that attend from 0; outputs `logits` in
fp32, [B, S, vocabulary] or, of every row's last real token, [B, 1, vocabulary], and `present.N.key/value` [B, kv heads,
T, D].

com.microsoft.GroupQueryAttention computes the positions itself, from how many tokens of a row are real, and expects
every row to start at once. Rows that are padded on the left are therefore rolled to the left on the way in, and their
results are rolled back on the way out; the cache holds them rolled. Head sizes that it attends over but does not rotate
are rotated before it, with the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

import sspcompile
from sspcompile.checkpoint.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from sspcompile.export.onnx.placed import COSINES, ELEMENT, SINES, Placed, Quantised
from sspcompile.families import layer_prefix
from sspcompile.nested.low_rank import INPUTS, OUTPUTS

if TYPE_CHECKING:
    from sspcompile.export.onnx.decoder import Decoder
    from sspcompile.families.graphs import GraphLayer

OPSET, IR_VERSION = 23, 11
MICROSOFT = "com.microsoft"
_PARTS = ("packed", "scales", "zeros")
# 0, 1, ..., S - 1; and the positions of new tokens [B, S], in graphs that rotate them before the attention.
_STEPS, _POSITION_IDS = "new.steps", "position_ids"


@dataclass
class Graph:
    """Nodes and initializers as they are emitted. `weights`: where each tensor lies; `dtype`: of the activations."""

    weights: Mapping[str, Placed]
    quantised: Mapping[str, Quantised]
    dtype: str
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[str], name: str, *, domain: str = "", outputs: int = 1, **kw: Any) -> str:
        """Emit a node and return its first output; further outputs are called NAME.1, NAME.2, ..."""
        names = [name, *(f"{name}.{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **kw))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant("i" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def scalar(self, value: float) -> str:
        kind = np.float16 if self.dtype == "F16" else np.float32
        return self.constant(f"f{value!r}", np.array(value, dtype=kind))

    def weight(self, name: str) -> str:
        """A tensor of the checkpoint, by reference; in the dtype of the activations, whatever it is stored in."""
        placed = self.weights[name]
        new, same = name not in self.initializers, placed.dtype == self.dtype
        cast = name if same else name + ".cast"
        if new:
            self.initializers[name] = placed.reference(name)
        if new and not same:
            self.node("Cast", [name], cast, to=ELEMENT[self.dtype])
        return cast

    def linear(self, source: str, name: str, *, bias: bool) -> str:
        """`source` times the transpose of NAME.weight [out, in], plus NAME.bias: as the checkpoint stores it. Two
        factors beside the matrix, as a nested model has them, are added to it.
        """
        weight = name + ".weight"
        if weight in self.quantised:
            out = self._quantised(source, weight)
        else:
            out = self._product(source, weight, name + ".out")
        if name + INPUTS in self.weights:
            low = self._product(source, name + INPUTS, name + ".low")
            out = self.node("Add", [out, self._product(low, name + OUTPUTS, name + ".change")], name + ".repaired")
        return self.node("Add", [out, self.weight(name + ".bias")], name + ".biased") if bias else out

    def _product(self, source: str, weight: str, name: str) -> str:
        inputs = [source, self.weight(weight)]
        return self.node("FusedMatMul", inputs, name, domain=MICROSOFT, transB=int(not self.weights[weight].turned))

    def products(self, source: str, name: str, parts: Mapping[str, int], *, bias: bool) -> list[str]:
        """`source` times the transposes of several matrices that lie one below the other in the rounded NAME.

        `parts`: the name of each -> its rows. Each has a bias of its own.
        """
        found = self.apart(self._quantised(source, name), name, list(parts.values()))
        if not bias:
            return found
        return [
            self.node("Add", [out, self.weight(part + ".bias")], part + ".biased")
            for out, part in zip(found, parts, strict=True)
        ]

    def apart(self, source: str, name: str, sizes: Sequence[int]) -> list[str]:
        """Split the last axis of `source` into pieces of `sizes`."""
        first = self.node("Split", [source, self.integers(*sizes)], name + ".parts", outputs=len(sizes), axis=-1)
        return [first, *(f"{first}.{number}" for number in range(1, len(sizes)))]

    def lookup(self, ids: str, table: str, name: str) -> str:
        """Rows of a table: of the rounded one where the head has rounded it already, of its own otherwise."""
        q = self.quantised.get(table)
        if q is None or table in self.weights:
            return self.node("Gather", [self.weight(table), ids], name)
        names = [f"{table}.{part}" for part in ("table", *_PARTS[1:])]
        for part, placed in zip(names, q.as_table(), strict=True):
            self.initializers[part] = placed.reference(part)
        inputs = [names[0], ids, *names[1:]]
        return self.node(
            "GatherBlockQuantized",
            inputs,
            name,
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=q.bits,
            block_size=q.block_size,
        )

    def _quantised(self, source: str, weight: str) -> str:
        q = self.quantised[weight]
        names = [weight + "." + part for part in _PARTS]
        for name, part in zip(names, q.parts, strict=True):
            self.initializers[name] = part.reference(name)
        return self.node(
            "MatMulNBits",
            [source, *names],
            weight + ".out",
            domain=MICROSOFT,
            K=q.columns,
            N=q.rows,
            bits=q.bits,
            block_size=q.block_size,
            accuracy_level=q.accuracy_level,
        )

    def times(self, source: str, factor: float, name: str) -> str:
        return source if factor == 1.0 else self.node("Mul", [source, self.scalar(factor)], name)

    def norm(self, source: str, name: str, epsilon: float) -> str:
        inputs = [source, self.weight(name + ".weight")]
        return self.node("RMSNormalization", inputs, name + ".out", axis=-1, epsilon=epsilon, stash_type=1)

    def joined_norm(self, stream: str, branch: str, name: str, epsilon: float) -> tuple[str, str]:
        """(norm of stream + branch, stream + branch)."""
        out, joined = name + ".out", name + ".joined"
        inputs = [stream, branch, self.weight(name + ".weight")]
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                inputs,
                [out, "", "", joined],
                name=name,
                domain=MICROSOFT,
                epsilon=epsilon,
            )
        )
        return out, joined


def emit(
    decoder: Decoder,
    weights: Mapping[str, Placed],
    quantised: Mapping[str, Quantised],
    rotary: Mapping[str, Placed],
    dtype: str,
    *,
    last_logits: bool = False,
) -> ModelProto:
    """The model; `dtype` ("F32", "F16") is that of activations and cache.

    `last_logits`: the head reads only the last real token of every row that is read.
    """
    graph, g = Graph(weights, quantised, dtype), decoder.geometry
    for name, placed in rotary.items():
        graph.initializers[name] = placed.reference(name)
    lengths, total, tail, start = _positions(graph)
    if decoder.rotates_apart:
        _position_ids(graph)
    ids = _rolled(graph, start)
    stream = graph.lookup(ids, EMBEDDING, "embedded")
    stream = graph.times(stream, decoder.embedding, "embedded.scaled")
    normed = graph.norm(stream, _first_norm(decoder, 0), decoder.epsilon)
    for index, layer in enumerate(decoder.layers):
        prefix = layer_prefix(index)
        if layer.heads:
            attended = _attention(graph, decoder, layer, index, normed, (lengths, total))
            attended = graph.times(attended, decoder.residual, prefix + "attention.scaled")
            normed, stream = graph.joined_norm(stream, attended, prefix + "post_attention_layernorm", decoder.epsilon)
        changed = _mlp(graph, decoder, layer.width, prefix + "mlp.", normed)
        changed = graph.times(changed, decoder.residual, prefix + "mlp.scaled")
        last = index + 1 == len(decoder.layers)
        following = FINAL_NORM if last else _first_norm(decoder, index + 1)
        normed, stream = graph.joined_norm(stream, changed, following, decoder.epsilon)
    hidden = _last(graph, normed, tail) if last_logits else _rolled_back(graph, normed, start)
    head = (EMBEDDING if g.tied else LM_HEAD).removesuffix(".weight")
    logits = graph.linear(hidden, head, bias=False)
    logits = graph.times(logits, 1.0 / decoder.logits, "logits.scaled")
    if dtype == "F32":
        graph.nodes[-1].output[0] = "logits"
    else:
        graph.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
    return _model(graph, decoder, last_logits=last_logits)


def _first_norm(decoder: Decoder, index: int) -> str:
    """The norm that a layer begins with: without attention it is the one of its MLP."""
    norm = "input_layernorm" if decoder.layers[index].heads else "post_attention_layernorm"
    return layer_prefix(index) + norm


def _positions(graph: Graph) -> tuple[str, str, str, str]:
    """(real tokens of a row less 1 [B], length of the mask, mask of new tokens [B, S], padding before them [B, 1])."""
    total = graph.node("Shape", ["attention_mask"], "mask.length", start=1, end=2)
    new = graph.node("Shape", ["input_ids"], "new.length", start=1, end=2)
    real = graph.node("ReduceSum", ["attention_mask", graph.integers(1)], "mask.real", keepdims=0)
    lengths = graph.node("Sub", [real, graph.integers(1)], "mask.last")
    lengths = graph.node("Cast", [lengths], "seqlens_k", to=TensorProto.INT32)
    scalar = graph.node("Squeeze", [total], "mask.total")
    scalar = graph.node("Cast", [scalar], "total_sequence_length", to=TensorProto.INT32)
    before = graph.node("Sub", [total, new], "mask.before")
    tail = graph.node("Slice", ["attention_mask", before, total, graph.integers(1)], "mask.new")
    start = graph.node("ArgMax", [tail], "mask.start", axis=1, keepdims=1)
    length = graph.node("Squeeze", [new], "new.count")
    zero, one = (graph.constant(f"i{n}.scalar", np.array(n, dtype=np.int64)) for n in (0, 1))
    graph.node("Range", [zero, length, one], _STEPS)
    return lengths, scalar, tail, start


def _position_ids(graph: Graph) -> None:
    """The positions [B, S] of new tokens, rolled as the tokens are: a row goes on behind its real tokens so far."""
    before = graph.node("Slice", ["attention_mask", graph.integers(0), "mask.before", graph.integers(1)], "mask.past")
    first = graph.node("ReduceSum", [before, graph.integers(1)], "mask.past.real", keepdims=1)
    graph.node("Add", [first, _STEPS], _POSITION_IDS)


def _order(graph: Graph, start: str, op: str, name: str) -> str:
    """Indices [B, S]: (s + start) mod S, or (s - start) mod S."""
    moved = graph.node(op, [_STEPS, start], name + ".moved")
    return graph.node("Mod", [moved, "new.count"], name + ".order")


def _rolled(graph: Graph, start: str) -> str:
    order = _order(graph, start, "Add", "roll")
    return graph.node("GatherElements", ["input_ids", order], "input_ids.rolled", axis=1)


def _rolled_back(graph: Graph, hidden: str, start: str) -> str:
    order = _order(graph, start, "Sub", "unroll")
    order = graph.node("Unsqueeze", [order, graph.integers(-1)], "unroll.index")
    return graph.node("GatherND", [hidden, order], "hidden.unrolled", batch_dims=1)


def _last(graph: Graph, hidden: str, tail: str) -> str:
    """[B, S, hidden], rolled -> [B, 1, hidden] of every row's last real token; `tail` is the mask [B, S]."""
    real = graph.node("ReduceSum", [tail, graph.integers(1)], "new.real", keepdims=1)
    place = graph.node("Sub", [real, graph.integers(1)], "new.last")
    place = graph.node("Unsqueeze", [place, graph.integers(-1)], "new.last.index")
    return graph.node("GatherND", [hidden, place], "hidden.last", batch_dims=1)


def _attention(
    graph: Graph, decoder: Decoder, layer: GraphLayer, index: int, source: str, lengths: tuple[str, str]
) -> str:
    """[B, S, hidden] -> [B, S, hidden], the layer's cache beside it."""
    g, prefix = decoder.geometry, layer_prefix(index) + "self_attn."
    rotated_before = layer.rotary and decoder.rotates_apart
    packed = not (g.family.qk_norm or rotated_before)
    queries, keys, values = _projected(graph, decoder, layer, prefix, source, packed=packed)
    if g.family.qk_norm:
        queries = _head_norm(graph, decoder, queries, prefix + "q_norm", layer.heads)
        keys = _head_norm(graph, decoder, keys, prefix + "k_norm", layer.kv_heads)
    if rotated_before:
        queries = _rotated(graph, queries, prefix + "q_rotated", layer.heads)
        keys = _rotated(graph, keys, prefix + "k_rotated", layer.kv_heads)
    rotated_inside = layer.rotary and not rotated_before
    number = decoder.caches[index]
    past, present = (
        [f"{side}.{number}.{part}" for part in ("key", "value")] for side in ("past_key_values", "present")
    )
    inputs = [queries, keys, values, *past, *lengths, *((COSINES, SINES) if rotated_inside else ())]
    window: dict[str, Any] = {} if layer.window is None else {"local_window_size": layer.window}
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            inputs,
            [prefix + "out", *present],
            name=prefix + "attention",
            domain=MICROSOFT,
            num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            scale=decoder.attention,
            do_rotary=int(rotated_inside),
            rotary_interleaved=0,
            **window,
        )
    )
    return graph.linear(prefix + "out", prefix + "o_proj", bias=g.o_bias)


def _projected(
    graph: Graph, decoder: Decoder, layer: GraphLayer, prefix: str, source: str, *, packed: bool
) -> tuple[str, str, str]:
    """Queries, keys and values, each [B, S, heads * D].

    Where `packed` allows it and one product computes all three, they stay in one tensor, which the attention takes in
    the place of the queries, with "" for the others.
    """
    g, joined = decoder.geometry, prefix + "qkv_proj"
    sizes = [count * g.head_dim for count in (layer.heads, layer.kv_heads, layer.kv_heads)]
    rounded = joined + ".weight" in graph.quantised
    if g.family.fused_qkv or (rounded and packed and not g.qkv_bias):
        together = graph.linear(source, joined, bias=g.qkv_bias)
        queries, keys, values = (together, "", "") if packed else graph.apart(together, joined, sizes)
    elif rounded:
        parts = {prefix + part: size for part, size in zip(_QKV, sizes, strict=True)}
        queries, keys, values = graph.products(source, joined + ".weight", parts, bias=g.qkv_bias)
    else:
        queries, keys, values = (graph.linear(source, prefix + part, bias=g.qkv_bias) for part in _QKV)
    return queries, keys, values


def _rotated(graph: Graph, source: str, name: str, heads: int) -> str:
    """[B, S, heads * D] at their positions, as the attention would rotate them."""
    inputs = [source, _POSITION_IDS, COSINES, SINES]
    return graph.node("RotaryEmbedding", inputs, name, domain=MICROSOFT, num_heads=heads, interleaved=0)


_QKV = ("q_proj", "k_proj", "v_proj")


def _head_norm(graph: Graph, decoder: Decoder, source: str, name: str, heads: int) -> str:
    """Normalise every head by itself: [B, S, heads * D] -> [B, S, heads * D]."""
    size = decoder.geometry.head_dim
    apart = graph.node("Reshape", [source, graph.integers(0, 0, heads, size)], name + ".apart")
    normed = graph.norm(apart, name, decoder.epsilon)
    return graph.node("Reshape", [normed, graph.integers(0, 0, heads * size)], name + ".together")


def _mlp(graph: Graph, decoder: Decoder, size: int, prefix: str, source: str) -> str:
    """SwiGLU of `size` channels: down(silu(gate) * up)."""
    bias = decoder.geometry.mlp_bias
    joined = prefix + "gate_up_proj"
    if decoder.fused_mlp:
        gate, up = graph.apart(graph.linear(source, joined, bias=bias), joined, (size, size))
    elif joined + ".weight" in graph.quantised:
        parts = {prefix + "gate_proj": size, prefix + "up_proj": size}
        gate, up = graph.products(source, joined + ".weight", parts, bias=bias)
    else:
        gate = graph.linear(source, prefix + "gate_proj", bias=bias)
        up = graph.linear(source, prefix + "up_proj", bias=bias)
    # Sigmoid and Mul, not QuickGelu: ONNX Runtime fuses the pair, and every checker knows it.
    open_gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], prefix + "sigmoid")], prefix + "silu")
    product = graph.node("Mul", [open_gate, up], prefix + "product")
    return graph.linear(product, prefix + "down_proj", bias=bias)


def _model(graph: Graph, decoder: Decoder, *, last_logits: bool) -> ModelProto:
    inputs = [
        _value("input_ids", TensorProto.INT64, "batch", "new"),
        _value("attention_mask", TensorProto.INT64, "batch", "total"),
    ]
    read = 1 if last_logits else "new"
    outputs = [_value("logits", TensorProto.FLOAT, "batch", read, decoder.geometry.vocab)]
    for layer, number in decoder.caches.items():
        for part in ("key", "value"):
            shape = ("batch", decoder.layers[layer].kv_heads, "{}", decoder.geometry.head_dim)
            for side, length, values in (("past_key_values", "past", inputs), ("present", "total", outputs)):
                dims = [length if size == "{}" else size for size in shape]
                values.append(_value(f"{side}.{number}.{part}", ELEMENT[graph.dtype], *dims))
    built = helper.make_graph(graph.nodes, "decoder", inputs, outputs, initializer=list(graph.initializers.values()))
    return helper.make_model(
        built,
        producer_name="sspcompile",
        producer_version=sspcompile.__version__,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
    )


def _value(name: str, kind: int, *dims: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)
