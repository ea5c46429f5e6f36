"""What a budget counts, in whole numbers: parameters, bytes of weights and KV cache while the model serves, or the time
of a decoded token (`latency`).

All are linear in what a cut removes: in every layer a query head, a key/value head (a group) and a channel of the MLP
(where there are experts, one in each) have a price each. So have the layer as a whole, norms and experts included, and
its attention as a whole, the norms around it included. A group's is its rows of k_proj and v_proj and, in bytes, its
keys and values of every cached token; in time, what reading them takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sspcompile.checkpoint.headers import dtype_bytes
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import Shapes, attention_shapes, layer_of, mlp_shapes, of_attention, tensor_shapes
from sspcompile.families import Geometry, hosting, layer_prefix
from sspcompile.families.windows import windows_of
from sspcompile.request.sizes import size_text, time_text
from sspcompile.slicing.layouts import GONE, SILENT, Shape

Tensors = Mapping[str, tuple[tuple[int, ...], str]]
Unit = Literal["heads", "parameters", "memory", "latency"]
# Time is typed in nanoseconds and counted in picoseconds: a channel of a small model on a fast device takes thousands.
NANOSECOND, SECOND = 10**3, 10**12
# A time that is named to be typed has so many digits: the table is no better than that.
DIGITS = 4


@dataclass(frozen=True)
class Serving:
    """What memory and time are counted for: `batch` sequences of `context` tokens at once."""

    context: int
    batch: int

    def __str__(self) -> str:
        sequences = "a sequence" if self.batch == 1 else f"{self.batch:,} sequences"
        return f"{sequences} of {self.context:,} tokens"


@dataclass(frozen=True)
class Measure:
    """`whole` of the dense model, and by layer the price of a query `head`, a `group`, a `channel` of the MLP, the
    `layer` as a whole, and its `attention_whole`.

    `added`: what the class that was wished for has beside the source's tensors (zero biases). `serving`: what memory or
    time is counted for.
    """

    unit: Unit
    whole: int
    head: tuple[int, ...]
    group: tuple[int, ...]
    channel: tuple[int, ...]
    layer: tuple[int, ...]
    attention_whole: tuple[int, ...]
    added: int = 0
    serving: Serving | None = None

    def attention(self, layer: int, shape: Shape) -> int:
        """Of one layer's heads in a shape (groups, heads per group); what does not depend on the shape left out."""
        groups, each = shape
        return groups * (each * self.head[layer] + self.group[layer])

    def kept(self, g: Geometry, shapes: Sequence[Shape], widths: Sequence[int] = ()) -> int:
        """Of the model with these shapes and widths of its layers; without widths every channel stays. A layer of the
        shape GONE is not there, one of the shape SILENT has no attention.
        """
        full, removed = (g.kv_heads, g.group_size), 0
        for layer, shape in enumerate(shapes):
            if shape == GONE:
                removed += self.layer[layer]
                continue
            if shape == SILENT:
                removed += self.attention_whole[layer]
            else:
                removed += self.attention(layer, full) - self.attention(layer, shape)
            removed += self.channel[layer] * (g.width - widths[layer]) if widths else 0
        return self.whole + self.added - removed


@dataclass(frozen=True)
class Bound:
    """At most `most` of what `measure` counts, which is the `share` of the dense model (1 where it is more); `flag` is
    what asks for it.
    """

    measure: Measure
    most: int
    share: float
    flag: str

    def typed(self, value: int) -> str:
        """The option with the smallest value that allows `value`."""
        if self.flag == "--size":
            return f"--size {math.ceil(1e4 * value / self.measure.whole) / 1e4:g}"
        if self.measure.unit == "latency":
            return f"{self.flag} {time_text(_rounded_up(-(-value // NANOSECOND)))}"
        return f"{self.flag} {size_text(value) if self.measure.unit == 'memory' else value}"

    def __str__(self) -> str:
        if self.flag == "--size":
            return f"--size {self.share:g}"
        most = time_text(self.most // NANOSECOND) if self.measure.unit == "latency" else self.most
        return f"{self.flag} {most}" + (f" for {self.measure.serving}" if self.measure.serving else "")


def parameters_of(g: Geometry, tensors: Tensors | None = None, host: str | None = None) -> Measure:
    """Parameters: elements of the checkpoint's `tensors`, or of what the geometry says where they are not known.

    `host`: the family whose class a uniform cut is wished for.
    """
    return _measure("parameters", g, tensors or _stated(g), lambda _: 1, (0,) * g.layers, host)


def memory_of(checkpoint: Checkpoint, serving: Serving, host: str | None = None) -> Measure:
    """Bytes of weights and KV cache, in the checkpoint's own dtype. A layer with a sliding window holds no more of it.

    Raises CheckpointError like `windows_of`.
    """
    g = checkpoint.geometry
    windows = windows_of(checkpoint.config, g.family, g.layers)
    held = [serving.batch * tokens for tokens in tokens_held(windows, serving)]
    return replace(_measure("memory", g, checkpoint.expected(), dtype_bytes, held, host), serving=serving)


def tokens_held(windows: Sequence[int | None], serving: Serving) -> list[int]:
    """Tokens of one sequence that the cache of every layer holds."""
    return [serving.context if window is None else min(window, serving.context) for window in windows]


def of_size(g: Geometry, size: float, tensors: Tensors | None = None, host: str | None = None) -> Bound:
    """The bound that a share of all parameters is."""
    return shared(parameters_of(g, tensors, host), size, "--size")


def at_most(measure: Measure, most: int, flag: str) -> Bound:
    """A number of what is counted, as a bound."""
    return Bound(measure, most, min(1.0, most / measure.whole), flag)


def shared(measure: Measure, share: float, flag: str) -> Bound:
    """A share of what is counted, as a bound."""
    # A share that was worked out from a count gives that count back: rounding loses less than this.
    lost = 1e-3 + math.ldexp(measure.whole, -51)
    return Bound(measure, math.floor(share * measure.whole + lost), share, flag)


def _rounded_up(number: int) -> int:
    """The next number with DIGITS digits, and zeros behind them."""
    step = int(10 ** max(0, len(str(number)) - DIGITS))
    return -(-number // step) * step


def _stated(g: Geometry) -> Tensors:
    return {name: (shape, "F32") for name, shape in tensor_shapes(g).items()}


def _measure(
    unit: Unit, g: Geometry, tensors: Tensors, width_of: Callable[[str], int], held: Sequence[int], host: str | None
) -> Measure:
    """`width_of`: what an element of a dtype counts; `held`: tokens in the cache of every layer."""
    found = hosting(g, host) if host is not None else None
    zero = found.zero_biases if found is not None else ()
    hosted = replace(g, qkv_bias=g.qkv_bias or "qkv" in zero, o_bias=g.o_bias or "o" in zero)
    output = [layer_prefix(layer) + "self_attn.o_proj.weight" for layer in range(g.layers)]
    whole = sum(math.prod(shape) * width_of(dtype) for shape, dtype in tensors.values())
    cached = 2 * g.head_dim * width_of(tensors[output[0]][1])
    head, group, channel, added = [], [], [], [0] * g.layers
    layers = [g.kv_heads * cached * tokens for tokens in held]
    attention = [*layers]
    for name, (shape, dtype) in tensors.items():
        if (at := layer_of(name)) is not None:
            layers[at] += math.prod(shape) * width_of(dtype)
            attention[at] += math.prod(shape) * width_of(dtype) if of_attention(g, name) else 0
    for layer in range(g.layers):

        def total(shapes: Shapes, own: str = output[layer]) -> int:
            # A bias that the source has not is written in the dtype of o_proj.
            return sum(
                math.prod(shape) * width_of(tensors[name if name in tensors else own][1])
                for name, shape in shapes.items()
            )

        one = total(attention_shapes(hosted, layer, 1, 1))
        head.append(total(attention_shapes(hosted, layer, 2, 1)) - one)
        group.append(total(attention_shapes(hosted, layer, 1, 2)) - one + cached * held[layer])
        narrow = (total(mlp_shapes(g, layer, 2)) - total(mlp_shapes(g, layer, 1))) if g.has_channels else 0
        channel.append(narrow)
        if zero:
            whole_layer = (layer, g.heads, g.kv_heads)
            added[layer] = total(attention_shapes(hosted, *whole_layer)) - total(attention_shapes(g, *whole_layer))
    whole += sum(g.kv_heads * cached * tokens for tokens in held)
    layers, attention = ([one + more for one, more in zip(some, added, strict=True)] for some in (layers, attention))
    units = tuple(head), tuple(group), tuple(channel)
    return Measure(unit, whole, *units, tuple(layers), tuple(attention), sum(added))
