"""What the graph of a decoder needs to know, read from a model folder: dense, uniform or with a count per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import named_tensors
from sspcompile.checkpoint.tensors import EMBEDDING, attention_shapes, mlp_shapes
from sspcompile.errors import CheckpointError, InputError, UnsupportedModelError
from sspcompile.families import FUSED_GATED, GATED, ONNX_FAMILIES, Geometry, geometry_of
from sspcompile.model.context import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Static position scalings: the frequencies do not depend on how long the text has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Families whose class has sliding windows, and those where they must be switched on.
WINDOWED = ("mistral", "phi3", "qwen2", "qwen3", "smollm3")
SWITCHED = ("qwen2", "qwen3", "smollm3")
# GroupQueryAttention takes head sizes that are multiples of the first number, and rotates those of the second.
HEAD_SIZE_MULTIPLE = 8
ROTARY_MULTIPLE = 16
# One token to read, and one to write.
LEAST_POSITIONS = 2


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
    plain = {key: value for key, value in config.items() if key not in ("per_layer_config", "auto_map")}
    if by_layer:  # the global counts are the largest of any layer, and need not fit each other
        plain["num_attention_heads"] = plain["num_key_value_heads"]
    g = geometry_of(plain)
    said = _Settings(plain)
    _refuse_unfit(g, said)
    layers = tuple(_layer(g, said, index, by_layer.get(str(index), {})) for index in range(g.layers))
    for index, layer in enumerate(layers):
        _refuse_kernel(index, layer, g.head_dim)
    tensors = named_tensors(folder, config, g)
    _check(tensors, g, layers, folder)
    frequencies, scale = _rotary(g, said)
    return Decoder(
        folder=folder,
        config=config,
        geometry=g,
        tensors=tensors,
        layers=layers,
        epsilon=float(said["rms_norm_eps"]),
        positions=_positions({**plain, "max_position_embeddings": said["max_position_embeddings"]}, positions),
        frequencies=frequencies,
        rotary_scale=scale,
        **_multipliers(g, said),
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


def _multipliers(g: Geometry, said: _Settings) -> dict[str, float]:
    if g.family.model_type != "granite":
        return {"embedding": 1.0, "attention": g.head_dim**-0.5, "residual": 1.0, "logits": 1.0}
    names = {
        "embedding": "embedding_multiplier",
        "attention": "attention_multiplier",
        "residual": "residual_multiplier",
        "logits": "logits_scaling",
    }
    return {name: float(said[key]) for name, key in names.items()}


class _Settings:
    """config.json, and where it is silent the defaults of its class in transformers.

    Checkpoints say what matters, and the class is loaded only for one that does not: it takes 300 MB.
    """

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self._plain = plain

    def __getitem__(self, key: str) -> Any:
        value = self._plain.get(key)
        return value if value is not None else getattr(self.stock, key, None)

    def says(self, key: str) -> Any:
        """The value when config.json has the key, None included; else the class's default."""
        return self._plain[key] if key in self._plain else getattr(self.stock, key, None)

    @cached_property
    def stock(self) -> PreTrainedConfig:
        """The configuration as its class reads it. Raises CheckpointError."""
        from transformers import CONFIG_MAPPING

        # Not a key of any class, only of how per-layer folders are opened.
        values = {key: value for key, value in self._plain.items() if key != "allow_global_per_layer_attribute_access"}
        try:
            return CONFIG_MAPPING[self._plain["model_type"]](**values)
        except (ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"transformers cannot read config.json: {reason}", hint="Check the file.") from error


def _refuse_unfit(g: Geometry, said: _Settings) -> None:
    family = g.family
    if family.model_type not in ONNX_FAMILIES:
        raise UnsupportedModelError(
            f"The ONNX export does not know {family.architecture}.",
            hint=f"Accepted: {', '.join(ONNX_FAMILIES)}; --format hf takes every family.",
        )
    if said["hidden_act"] != "silu" or family.mlp not in (GATED, FUSED_GATED):
        raise UnsupportedModelError(
            f"The ONNX export knows SwiGLU layers, not {said['hidden_act']!r}.", hint="Use --format hf."
        )


def _layer(g: Geometry, said: _Settings, index: int, counts: Mapping[str, int]) -> Layer:
    without_positions = said["no_rope_layers"] if g.family.model_type == "smollm3" else None
    return Layer(
        heads=counts.get("num_attention_heads", g.heads),
        kv_heads=counts.get("num_key_value_heads", g.kv_heads),
        rotary=bool(without_positions[index]) if without_positions else True,
        window=_window(g, said, index),
    )


def _window(g: Geometry, said: _Settings, index: int) -> int | None:
    """The sliding window of a layer, where it has one."""
    kind = g.family.model_type
    if kind not in WINDOWED or (kind in SWITCHED and not said["use_sliding_window"]):
        return None
    window = said.says("sliding_window")
    kinds = said["layer_types"] if window and kind in SWITCHED else None
    return int(window) if window and (not kinds or kinds[index] == "sliding_attention") else None


def _refuse_kernel(index: int, layer: Layer, head_dim: int) -> None:
    """What GroupQueryAttention refuses only when it runs."""
    if head_dim % HEAD_SIZE_MULTIPLE:
        raise UnsupportedModelError(
            f"ONNX Runtime attends over head sizes that are multiples of {HEAD_SIZE_MULTIPLE}, not {head_dim}.",
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


def _rotary(g: Geometry, said: _Settings) -> tuple[np.ndarray, float]:
    """Angles per position, fp32 [head_dim / 2], and the factor of sines and cosines.

    Source: Su et al., RoFormer (2021), section 3.2; scaled kinds as transformers computes them.
    """
    import torch

    parameters = _rope_parameters(said)
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        what = f"{kind!r} positions" if kind not in ROPE_TYPES else "rotary positions on a part of the head"
        raise UnsupportedModelError(
            f"The ONNX export cannot compute {what} exactly.",
            hint=f"Accepted: {', '.join(ROPE_TYPES)} on whole heads; --format hf takes every kind.",
        )
    if kind == "default":
        # By torch, whose powers differ from numpy's in the last bit, which is 1e-3 of an angle at position 30,000.
        exponents = torch.arange(0, g.head_dim, 2, dtype=torch.int64).float() / g.head_dim
        return (1.0 / float(parameters["rope_theta"]) ** exponents).numpy(), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](said.stock, device="cpu")
    return frequencies.float().numpy(), float(scale)


def _rope_parameters(said: _Settings) -> dict[str, Any]:
    """As transformers 5 spells them; a configuration in the older spelling says them only through its class."""
    if isinstance(said.says("rope_parameters"), Mapping) and "rope_theta" in said["rope_parameters"]:
        return dict(said["rope_parameters"])
    return dict(said.stock.rope_parameters or {})
