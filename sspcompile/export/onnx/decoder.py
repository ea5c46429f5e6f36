"""What the graph of a decoder needs to know, read from a model folder: dense, uniform or with a count per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import demand_shapes, named_tensors
from sspcompile.checkpoint.tensors import EMBEDDING, LM_HEAD, attention_shapes, mlp_shapes
from sspcompile.checkpoint.tied import untied_by_weights
from sspcompile.errors import CheckpointError, InputError
from sspcompile.families import FUSED_GATED, Geometry, Positions, geometry_of, positions_of, stand_in
from sspcompile.families.graphs import GraphLayer, demand_graph, graph_layers, graph_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Only how per-layer folders are opened; they say nothing of what a layer computes.
OPENING_KEYS = ("per_layer_config", "auto_map", "allow_global_per_layer_attribute_access")
# GroupQueryAttention rotates heads of sizes that are multiples of this.
ROTARY_MULTIPLE = 16
# One token to read, and one to write.
LEAST_POSITIONS = 2


@dataclass(frozen=True)
class Decoder:
    """A decoder as the graph sees it.

    `frequencies` are the rotary angles per position, fp32 [head_dim / 2]; `rotary_scale` multiplies their sines and
    cosines. `embedding`, `attention`, `residual`, `logits` are Granite's multipliers (1, 1/sqrt(head_dim), 1, 1
    elsewhere; `logits` divides). `positions`: the longest context. `config` is one that transformers loads.
    """

    folder: Path
    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Mapping[str, TensorInfo]
    layers: tuple[GraphLayer, ...]
    epsilon: float
    positions: int
    frequencies: np.ndarray
    rotary_scale: float
    embedding: float
    attention: float
    residual: float
    logits: float

    def with_tensors(self, others: Mapping[str, TensorInfo]) -> Decoder:
        """The same with `others` in the places of its own tensors of those names and shapes."""
        return replace(self, tensors={**self.tensors, **others})

    @property
    def caches(self) -> Mapping[int, int]:
        """Layer -> the number of its keys and values among the inputs; one without attention has none.

        onnxruntime-genai counts them from 0 without a gap.
        """
        attending = (index for index, layer in enumerate(self.layers) if layer.heads)
        return {layer: number for number, layer in enumerate(attending)}

    @property
    def rotates_apart(self) -> bool:
        """Whether queries and keys are rotated before the attention, which does not rotate heads of this size."""
        return self.geometry.head_dim % ROTARY_MULTIPLE != 0

    @property
    def fused_mlp(self) -> bool:
        return self.geometry.family.mlp == FUSED_GATED


def read_decoder(folder: Path, *, positions: int | None = None) -> Decoder:
    """Read configuration and headers. `positions` shortens the context that the graph is made for.

    Raises UnsupportedModelError for what ONNX Runtime's kernels or this graph cannot compute exactly, CheckpointError
    for files that contradict each other, and InputError for positions that the model does not have.
    """
    config = read_json(folder / "config.json")
    by_layer = config.get("per_layer_config") or {}
    plain = {key: value for key, value in config.items() if key not in OPENING_KEYS}
    if by_layer:  # the global counts are the largest of any layer, and need not fit each other
        plain["num_attention_heads"] = plain["num_key_value_heads"]
    else:
        config = plain = stand_in(plain) or plain
    stated = geometry_of(plain)
    tensors = named_tensors(folder, config, stated)
    g = untied_by_weights(stated, tensors)
    demand_graph(plain, g, {info.dtype for name, info in tensors.items() if name != LM_HEAD or not g.tied})
    stated_of = [by_layer.get(str(index), {}) for index in range(g.layers)]
    widths = [one.get("intermediate_size", g.intermediate) for one in stated_of]
    layers = graph_layers(plain, g, [_counts(g, one) for one in stated_of], widths)
    rope = graph_positions(plain, g)
    _check(tensors, g, layers, folder)
    frequencies, scale = _rotary(g, rope, plain)
    longest = plain.get("max_position_embeddings", g.family.silent["max_position_embeddings"])
    return Decoder(
        folder=folder,
        config=config,
        geometry=g,
        tensors=tensors,
        layers=layers,
        epsilon=float(_said(plain, g, "rms_norm_eps")),
        positions=_positions({**plain, "max_position_embeddings": longest}, positions),
        frequencies=frequencies,
        rotary_scale=scale,
        **_multipliers(g, plain),
    )


def _positions(config: Mapping[str, Any], wanted: int | None) -> int:
    longest = positions_of(config)
    if longest is None or longest < LEAST_POSITIONS:
        raise CheckpointError(
            f"config.json has {config['max_position_embeddings']!r:.60} as max_position_embeddings.",
            hint=f"It must be a whole number of at least {LEAST_POSITIONS}.",
        )
    if wanted is not None and not LEAST_POSITIONS <= wanted <= longest:
        raise InputError(
            f"The context cannot be {wanted} tokens: the model was made for {longest} positions.",
            hint=f"Give at least {LEAST_POSITIONS} and at most {longest}.",
        )
    return wanted or longest


def _counts(g: Geometry, layer: Mapping[str, int]) -> tuple[int, int]:
    return layer.get("num_attention_heads", g.heads), layer.get("num_key_value_heads", g.kv_heads)


def _said(plain: Mapping[str, Any], g: Geometry, key: str) -> Any:
    """A number of config.json, and where it is silent what its class takes. Raises CheckpointError for another."""
    value = plain.get(key, g.family.silent[key])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has {key} = {value!r:.60}.", hint=f"{key} must be a number.")
    return value


def _multipliers(g: Geometry, plain: Mapping[str, Any]) -> dict[str, float]:
    if g.family.model_type != "granite":
        return {"embedding": 1.0, "attention": g.head_dim**-0.5, "residual": 1.0, "logits": 1.0}
    names = {
        "embedding": "embedding_multiplier",
        "attention": "attention_multiplier",
        "residual": "residual_multiplier",
        "logits": "logits_scaling",
    }
    return {name: float(_said(plain, g, key)) for name, key in names.items()}


def _check(tensors: Mapping[str, TensorInfo], g: Geometry, layers: tuple[GraphLayer, ...], folder: Path) -> None:
    """Every tensor that the graph will use is there, in the shape that it takes."""
    wanted: dict[str, tuple[int, ...]] = {EMBEDDING: (g.vocab, g.hidden)}
    if not g.tied:
        wanted[LM_HEAD] = (g.vocab, g.hidden)
    for index, layer in enumerate(layers):
        wanted |= attention_shapes(g, index, layer.heads, layer.kv_heads) if layer.heads else {}
        wanted |= mlp_shapes(g, index, layer.width)
    demand_shapes(folder, tensors, wanted)


def _rotary(g: Geometry, rope: Positions, plain: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Angles per position, fp32 [head_dim / 2], and the factor of sines and cosines.

    Source: Su et al., RoFormer (2021), section 3.2; scaled kinds as transformers computes them.
    """
    import torch

    if rope.kind == "default":
        # By torch, whose powers differ from numpy's in the last bit, which is 1e-3 of an angle at position 30,000.
        exponents = torch.arange(0, g.head_dim, 2, dtype=torch.int64).float() / g.head_dim
        return (1.0 / float(rope.parameters["rope_theta"]) ** exponents).numpy(), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # What scales positions looks at the size of a head alone, and one head divides every hidden_size.
    one = {**plain, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": g.head_dim}
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope.kind](_stock(one), device="cpu")
    return frequencies.float().numpy(), float(scale)


def _stock(plain: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration as its class reads it. Raises CheckpointError."""
    from transformers import CONFIG_MAPPING

    from sspcompile.model.opening import readable

    with readable("config.json"):
        return CONFIG_MAPPING[plain["model_type"]](**plain)
