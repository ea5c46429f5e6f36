"""Which tensor of the checkpoint becomes which of the GGUF, and what is done to it on the way.

Matrices keep their orientation ([out, in]). Most are copied; q and k may change the order of their rows, three may
become one, and a scale that an architecture has no key for is multiplied in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.checkpoint.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from sspcompile.errors import UnsupportedModelError
from sspcompile.export.gguf.rounding import Kind, as_floats, encode, stored_type
from sspcompile.export.gguf.source import Source
from sspcompile.families import layer_prefix

BAND_BYTES = 1 << 20
# Part of a layer in the checkpoint -> in the GGUF.
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Spread:
    """Blocks of `size` rows (axis 0) or columns (axis 1) set apart: `places[n]` is the block that comes to n, None one
    of zeros."""

    axis: int
    size: int
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint with what is done to it: value * `factor` + `shift`.

    `paired`: the size of a head whose rows r and r + size/2 become neighbours; 0 leaves rows in their order.
    """

    info: TensorInfo
    paired: int = 0
    factor: float = 1.0
    shift: float = 0.0
    spread: Spread | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.spread is None:
            return self.info.shape
        shape = list(self.info.shape)
        shape[self.spread.axis] = len(self.spread.places) * self.spread.size
        return tuple(shape)

    @property
    def as_it_is(self) -> bool:
        return not self.paired and self.factor == 1.0 and self.shift == 0.0 and self.spread is None

    @property
    def exact(self) -> bool:
        """Whether the values change, so that a 16-bit type would round them once more."""
        return self.factor != 1.0 or self.shift != 0.0


@dataclass(frozen=True)
class Written:
    """One tensor of the GGUF: its parts below each other, in the type `kind`. `values` stand for one that no
    checkpoint holds."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    values: np.ndarray | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are the checkpoint's."""
        return bool(self.parts) and all(part.as_it_is and part.info.dtype == self.kind for part in self.parts)

    def bands(self) -> Iterator[np.ndarray]:
        """Its bytes, a band of rows at a time. Raises CheckpointError for values that `kind` cannot hold."""
        if self.values is not None:
            yield encode(self.values, self.kind, self.name)
        for part in self.parts:
            for words in _bands(part):
                if part.info.dtype == self.kind and not part.exact:
                    yield words
                else:
                    values = as_floats(words, part.info.dtype) * np.float32(part.factor) + np.float32(part.shift)
                    yield encode(values, self.kind, self.name)


def _bands(part: Part) -> Iterator[np.ndarray]:
    """Raw words of a part, rows in their new order; a band holds whole heads."""
    if part.spread is not None:
        yield _paired(_spread(read_words(part.info), part.spread), part.paired)
        return
    step = part.paired or 1
    rows = part.info.shape[0]
    count = max(1, BAND_BYTES // max(1, part.info.row_bytes) // step) * step
    for start in range(0, rows, count):
        yield _paired(read_words(part.info.band(start, min(rows, start + count))), part.paired)


def _paired(words: np.ndarray, size: int) -> np.ndarray:
    """[heads * size, ...] with rows r and r + size/2 of every head beside each other."""
    if not size:
        return words
    halves = words.reshape(-1, 2, size // 2, *words.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(words.shape)


def _spread(words: np.ndarray, spread: Spread) -> np.ndarray:
    shape = list(words.shape)
    shape[spread.axis] = len(spread.places) * spread.size
    found = np.zeros(shape, dtype=words.dtype)
    for place, block in enumerate(spread.places):
        if block is not None:
            to, of = ([slice(None)] * words.ndim for _ in range(2))
            to[spread.axis] = slice(place * spread.size, (place + 1) * spread.size)
            of[spread.axis] = slice(block * spread.size, (block + 1) * spread.size)
            found[tuple(to)] = words[tuple(of)]
    return found


def written_tensors(source: Source, kind: Kind) -> list[Written]:
    """Every tensor of the GGUF, in the order in which a model reads them."""
    here = _Here(source, kind)
    tensors = [here.one("token_embd.weight", EMBEDDING, table=True), *_turns(source)]
    for index in range(source.geometry.layers):
        tensors += [*_norms(here, index), *_attention(here, index), *_mlp(here, index)]
    shift = source.model.form.norm_shift
    tensors.append(here.one("output_norm.weight", f"{FINAL_NORM}.weight", shift=shift))
    if not source.geometry.tied:
        tensors.append(here.one("output.weight", LM_HEAD, table=True))
    elif source.model.form.architecture == "step35":
        raise UnsupportedModelError("step35 has an output matrix of its own.", hint="Use --format onnx or hf.")
    return tensors


@dataclass(frozen=True)
class _Here:
    """The checkpoint and the type that is asked for."""

    source: Source
    kind: Kind

    def one(self, name: str, of: str, *, table: bool = False, **changes: object) -> Written:
        return self.joined(name, (self.part(of, **changes),), table=table)

    def part(self, of: str, **changes: object) -> Part:
        return replace(Part(self.source.tensors[of]), **changes)  # type: ignore[arg-type]

    def joined(self, name: str, parts: tuple[Part, ...], *, table: bool = False) -> Written:
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        wanted = (self.kind.embedding if table else self.kind.here) or "F32"
        exact = any(part.exact for part in parts)
        return Written(name, stored_type(wanted, shape, exact=exact), shape, parts)


def _turns(source: Source) -> list[Written]:
    """What llama3 scaling divides the frequencies by, [head_dim / 2]; nothing for other positions.

    Source: `_compute_llama3_parameters` in modeling_rope_utils.py of transformers 5.23 (Llama 3.1).
    """
    parameters = source.model.positions.parameters
    if parameters["rope_type"] != "llama3":
        return []
    low, high, factor, trained = (
        float(parameters[key])
        for key in ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
    )
    exponents = np.arange(0, source.geometry.head_dim, 2, dtype=np.float64) / source.geometry.head_dim
    lengths = 2 * math.pi * float(parameters["rope_theta"]) ** exponents
    smooth = np.clip((trained / lengths - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / ((1 - smooth) / factor + smooth)
    return [Written("rope_freqs.weight", "F32", divisors.shape, values=divisors.astype(np.float32))]


def _norms(here: _Here, index: int) -> Iterator[Written]:
    names = FOUR_NORMS if len(here.source.geometry.family.norms) == len(FOUR_NORMS) else TWO_NORMS
    shift = here.source.model.form.norm_shift
    for norm, name in names.items():
        yield here.one(f"blk.{index}.{name}.weight", f"{layer_prefix(index)}{norm}.weight", shift=shift)


def _attention(here: _Here, index: int) -> Iterator[Written]:
    source, form = here.source, here.source.model.form
    g, stem = source.geometry, f"{layer_prefix(index)}self_attn."
    pairs = {"q_proj": g.head_dim, "k_proj": g.head_dim} if form.permuted else {}
    normed = g.family.qk_norm
    factor = 1.0 if normed else source.model.query_factor
    spread = _heads_spread(source, index) if form.padded else {}

    def part(name: str, kind: str) -> Part:
        # The bias of o_proj belongs to no head.
        places = None if (name, kind) == ("o_proj", "bias") else spread.get(name)
        return here.part(
            f"{stem}{name}.{kind}", paired=pairs.get(name, 0), factor=factor if name == "q_proj" else 1.0, spread=places
        )

    kinds = {name: ["weight", *(["bias"] if has else [])] for name, has in _biased(source).items()}
    if form.fused:
        yield here.joined(
            f"blk.{index}.attn_qkv.weight", tuple(part(n, "weight") for n in ("q_proj", "k_proj", "v_proj"))
        )
    for name, to in ATTENTION.items():
        if form.fused and name != "o_proj":
            continue
        for kind in kinds[name]:
            yield here.joined(f"blk.{index}.{to}.{kind}", (part(name, kind),))
    if normed:
        for name, scale in (("q", source.model.query_factor), ("k", 1.0)):
            # (weight + shift) * scale
            shift = form.norm_shift * scale
            yield here.one(
                f"blk.{index}.attn_{name}_norm.weight", f"{stem}{name}_norm.weight", factor=scale, shift=shift
            )


def _biased(source: Source) -> dict[str, bool]:
    g = source.geometry
    return {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), g.qkv_bias), "o_proj": g.o_bias}


def _mlp(here: _Here, index: int) -> Iterator[Written]:
    source = here.source
    width, widest = source.model.widths[index], max(source.model.widths)
    spread = None
    if source.model.form.padded and width < widest:
        spread = (*range(width), *[None] * (widest - width))
    for name, to in MLP.items():
        axis = 1 if to == "ffn_down" else 0
        places = None if spread is None else Spread(axis, 1, spread)
        yield here.one(f"blk.{index}.{to}.weight", f"{layer_prefix(index)}{name}.weight", spread=places)
        if source.geometry.mlp_bias:
            yield here.one(f"blk.{index}.{to}.bias", f"{layer_prefix(index)}{name}.bias")


def _heads_spread(source: Source, index: int) -> dict[str, Spread]:
    """Where the heads of a layer come to lie among those of the widest: groups keep their places, and their query heads
    stay beside each other."""
    counts, size = source.model.counts, source.geometry.head_dim
    heads, kv_heads = counts[index]
    most, groups = padded_counts(counts)
    if (heads, kv_heads) == (most, groups):
        return {}
    group, widest = heads // kv_heads, most // groups
    queries: list[int | None] = [None] * most
    for head in range(heads):
        queries[head // group * widest + head % group] = head
    keys = (*range(kv_heads), *[None] * (groups - kv_heads))
    rows = {"q_proj": tuple(queries), "k_proj": keys, "v_proj": keys}
    return {name: Spread(0, size, places) for name, places in rows.items()} | {
        "o_proj": Spread(1, size, tuple(queries))
    }


def padded_counts(counts: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(query, key/value) heads that hold every layer: the most groups, each of the most query heads."""
    groups = max(kv_heads for _, kv_heads in counts)
    return groups * max(heads // kv_heads for heads, kv_heads in counts), groups
