"""What the graph of a decoder needs to know, read from a model folder: dense, uniform or with a count per layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.checkpoint.source import TensorInfo, tensor_table
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families import FUSED_GATED, GATED, ONNX_FAMILIES, Geometry, geometry_of
from sspcompile.tensors import EMBEDDING, attention_shapes, mlp_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Static position scalings: the frequencies do not depend on how long the text has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROTARY_MULTIPLE = 16
PLAIN_MULTIPLE = 8


@dataclass(frozen=True)
class Layer:
    """One layer's attention. `window`: how many keys a query sees, itself included; None for all before it."""

    heads: int
    kv_heads: int
    rotary: bool
    window: int | None


@dataclass(frozen=True)
class Decoder:
    """A decoder as the graph sees it.

    `frequencies` are the rotary angles per position, fp32 [head_dim / 2]; `rotary_scale` multiplies their sines and
    cosines. `embedding`, `attention`, `residual`, `logits` are Granite's multipliers (1, 1/sqrt(head_dim), 1, 1
    elsewhere; `logits` divides). `positions`: the longest context.
    """

    folder: Path
    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Mapping[str, TensorInfo]
    layers: tuple[Layer, ...]
    epsilon: float
    positions: int
    frequencies: np.ndarray
    rotary_scale: float
    embedding: float
    attention: float
    residual: float
    logits: float

    @property
    def fused_mlp(self) -> bool:
        return self.geometry.family.mlp == FUSED_GATED


def read_decoder(folder: Path, *, positions: int | None = None) -> Decoder:
    """Read configuration and headers. `positions` shortens the context that the graph is made for.

    Raises UnsupportedModelError for what ONNX Runtime's kernels or this graph cannot compute exactly, and
    CheckpointError for files that contradict each other.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    by_layer = config.get("per_layer_config") or {}
    plain = {key: value for key, value in config.items() if key not in ("per_layer_config", "auto_map")}
    if by_layer:  # the global counts are the largest of any layer, and need not fit each other
        plain["num_attention_heads"] = plain["num_key_value_heads"]
    g = geometry_of(plain)
    stock = _stock_config(plain)
    _refuse_unfit(g, stock)
    layers = tuple(_layer(g, stock, index, by_layer.get(str(index), {})) for index in range(g.layers))
    for index, layer in enumerate(layers):
        _refuse_kernel(index, layer, g.head_dim)
    tensors = tensor_table(folder)
    _check(tensors, g, layers, folder)
    frequencies, scale = _rotary(g, stock)
    longest = int(stock.max_position_embeddings)
    if positions is not None and positions > longest:
        raise UnsupportedModelError(
            f"The model was made for {longest} positions, not {positions}.", hint=f"Give at most {longest}."
        )
    return Decoder(
        folder=folder, config=config, geometry=g, tensors=tensors, layers=layers,
        epsilon=float(stock.rms_norm_eps), positions=positions or longest, frequencies=frequencies,
        rotary_scale=scale,
        embedding=float(getattr(stock, "embedding_multiplier", 1.0)),
        attention=float(getattr(stock, "attention_multiplier", g.head_dim**-0.5)),
        residual=float(getattr(stock, "residual_multiplier", 1.0)),
        logits=float(getattr(stock, "logits_scaling", 1.0)),
    )  # fmt: skip


def _stock_config(plain: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with the defaults of its class filled in."""
    from transformers import CONFIG_MAPPING

    values = {key: value for key, value in plain.items() if key != "allow_global_per_layer_attribute_access"}
    try:
        return CONFIG_MAPPING[plain["model_type"]](**values)
    except (ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot read config.json: {reason}", hint="Check the file.") from error


def _refuse_unfit(g: Geometry, stock: PreTrainedConfig) -> None:
    family = g.family
    if family.model_type not in ONNX_FAMILIES:
        raise UnsupportedModelError(
            f"The ONNX export does not know {family.architecture}.",
            hint=f"Accepted: {', '.join(ONNX_FAMILIES)}; --format hf takes every family.",
        )
    if getattr(stock, "hidden_act", "silu") != "silu" or family.mlp not in (GATED, FUSED_GATED):
        raise UnsupportedModelError(
            f"The ONNX export knows SwiGLU layers, not {stock.hidden_act!r}.", hint="Use --format hf."
        )


def _layer(g: Geometry, stock: PreTrainedConfig, index: int, counts: Mapping[str, int]) -> Layer:
    kinds = getattr(stock, "layer_types", None)
    sliding = kinds[index] == "sliding_attention" if kinds else True
    window = getattr(stock, "sliding_window", None)
    if g.family.window == "use_sliding_window" and not getattr(stock, "use_sliding_window", False):
        window = None
    without_positions = getattr(stock, "no_rope_layers", None)
    return Layer(
        heads=counts.get("num_attention_heads", g.heads),
        kv_heads=counts.get("num_key_value_heads", g.kv_heads),
        rotary=bool(without_positions[index]) if without_positions else True,
        window=int(window) if window and sliding else None,
    )


def _refuse_kernel(index: int, layer: Layer, head_dim: int) -> None:
    """What GroupQueryAttention refuses only when it runs."""
    multiple = ROTARY_MULTIPLE if layer.rotary else PLAIN_MULTIPLE
    if head_dim % multiple:
        raise UnsupportedModelError(
            f"ONNX Runtime's attention kernel takes head sizes that are multiples of {multiple}, not {head_dim}.",
            hint="Use --format hf.",
        )
    if layer.heads % layer.kv_heads:
        raise UnsupportedModelError(
            f"Layer {index} has {layer.heads} query heads for {layer.kv_heads} key/value heads.",
            hint="Build the artifact again.",
        )


def _check(tensors: Mapping[str, TensorInfo], g: Geometry, layers: tuple[Layer, ...], folder: Path) -> None:
    """Every tensor that the graph will use is there, in the shape that it takes."""
    wanted: dict[str, tuple[int, ...]] = {EMBEDDING: (g.vocab, g.hidden)}
    for index, layer in enumerate(layers):
        wanted |= attention_shapes(g, index, layer.heads, layer.kv_heads) | mlp_shapes(g, index)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{folder} holds {found} as {name}; its config.json asks for {list(shape)}.",
                hint="Build or download it again.",
            )


def _rotary(g: Geometry, stock: PreTrainedConfig) -> tuple[np.ndarray, float]:
    """Angles per position, fp32 [head_dim / 2], and the factor of sines and cosines.

    Source: Su et al., RoFormer (2021), section 3.2; scaled kinds as transformers computes them.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(stock.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        what = f"{kind!r} positions" if kind not in ROPE_TYPES else "rotary positions on a part of the head"
        raise UnsupportedModelError(
            f"The ONNX export cannot compute {what} exactly.",
            hint=f"Accepted: {', '.join(ROPE_TYPES)} on whole heads; --format hf takes every kind.",
        )
    if kind == "default":
        exponents = torch.arange(0, g.head_dim, 2, dtype=torch.int64).float() / g.head_dim
        return (1.0 / float(parameters["rope_theta"]) ** exponents).numpy(), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](stock, device="cpu")
    return frequencies.float().numpy(), float(scale)
