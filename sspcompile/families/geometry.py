"""Sizes of a decoder, read from its configuration by the facts of its family."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families.positions import rope_of
from sspcompile.families.table import FAMILIES, REFUSED, Family
from sspcompile.families.windows import is_windowed


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder as its configuration states them; counts of heads are per layer and equal in all layers.

    `sparse`: the layers whose MLP is `experts` experts of `expert_intermediate` each, `active_experts` of which a
    token visits. `windowed`: some layer attends through a sliding window, or keeps no more than one in its cache.
    `fixed_heads`: the stock class can state no other number of query heads (see Family.longrope_by_heads).
    `named_tokenizer`: the class that its tokenizer names is not to be exchanged (see checkpoint.tokenizers).
    """

    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str
    residual_multiplier: float = 1.0
    windowed: bool = False
    fixed_heads: bool = False
    named_tokenizer: bool = False
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    sparse: frozenset[int] = frozenset()

    @property
    def group_size(self) -> int:
        """Query heads per key/value head in the dense model."""
        return self.heads // self.kv_heads

    @property
    def total_heads(self) -> int:
        return self.layers * self.heads

    @property
    def is_dense(self) -> bool:
        """Whether the MLP of every layer is the family's own: no layer chooses between experts."""
        return self.family.experts is None

    @property
    def has_channels(self) -> bool:
        """Whether channels of MLPs can be cut: all layers have one MLP, or all have experts. With both there are two
        widths.
        """
        return self.is_dense or self._all_sparse

    @property
    def _all_sparse(self) -> bool:
        return len(self.sparse) == self.layers

    @property
    def mlps(self) -> int:
        """The MLPs that stand beside each other in a layer and are equally wide: its experts, or one."""
        return self.experts if self._all_sparse else 1

    @property
    def width(self) -> int:
        """Channels of each of the `mlps` of a layer."""
        return self.expert_intermediate if self._all_sparse else self.intermediate

    @property
    def visited(self) -> int:
        """Channels of MLPs that a token passes in a layer: of the experts, those of the few that it visits."""
        return self.active_experts * self.expert_intermediate if self.sparse else self.intermediate

    @property
    def channels(self) -> int:
        """Channels of a layer. Those of its MLPs stand behind each other: channel c of expert e is e * width + c."""
        return self.mlps * self.width


def family_of(config: Mapping[str, Any]) -> Family:
    """The table row for a configuration.

    Raises UnsupportedModelError with the reason for a known misfit, and with the list of what is accepted otherwise.
    """
    model_type = config.get("model_type")
    accepted = ", ".join(sorted(FAMILIES))
    if not isinstance(model_type, str):
        raise CheckpointError("config.json names no model_type.", hint=f"Accepted: {accepted}.")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type, "its tensors are not described in the family table")
    raise UnsupportedModelError(
        f"Models of type {model_type!r} cannot be cut: {reason}.", hint=f"Accepted types: {accepted}."
    )


# Far beyond any model, and small enough that what is counted by them fits into memory.
LARGEST_SIZE = 1 << 31
LARGEST = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "n_routed_experts": 4096,
    "num_experts_per_tok": 4096,
}


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    most = LARGEST.get(key, LARGEST_SIZE)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CheckpointError(
            f"config.json has {key} = {_shortly(value)}.", hint=f"{key} must be a whole number from 1 to {most:,}."
        )
    return value


def _shortly(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


def _switch(family: Family, rule: str | bool, config: Mapping[str, Any]) -> bool:
    if isinstance(rule, bool):
        return rule
    return bool(config.get(rule, family.silent.get(rule, False)))


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Read the sizes from a configuration. Raises CheckpointError or UnsupportedModelError."""
    family = family_of(config)
    if config.get("per_layer_config"):
        raise UnsupportedModelError(
            "This checkpoint is a per-layer cut already.", hint="Build from the dense model that it was cut from."
        )
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    # A null is as many as query heads in every class, silence is not.
    silent_kv = heads if "num_key_value_heads" in config else family.silent.get("num_key_value_heads", heads)
    kv_heads = _positive(config, "num_key_value_heads", default=silent_kv)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} query heads for {kv_heads} key/value heads.",
            hint="num_attention_heads must be a multiple of num_key_value_heads.",
        )
    silent_head_dim = None if "head_dim" in config else family.head_dim
    if config.get("head_dim") is None and silent_head_dim is None and hidden % heads:
        raise CheckpointError(
            f"config.json has hidden_size {hidden} for {heads} heads and no head_dim.", hint="Set head_dim."
        )
    layers = _positive(config, "num_hidden_layers")
    rope = rope_of(config, family)
    return Geometry(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", default=silent_head_dim or hidden // heads),
        vocab=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=_switch(family, family.qkv_bias, config),
        o_bias=_switch(family, family.o_bias, config),
        mlp_bias=_switch(family, family.mlp_bias, config),
        # 4.x writes torch_dtype, 5.x writes dtype.
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        residual_multiplier=_multiplier(family.residual_multiplier, config),
        windowed=is_windowed(config, family, layers),
        fixed_heads=family.longrope_by_heads and rope.parameters.get("short_factor") is not None,
        **_sparse(family, config, layers),
    )


def _multiplier(key: str | None, config: Mapping[str, Any]) -> float:
    value = 1.0 if key is None else config.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"config.json has {key} = {_shortly(value)}.", hint=f"{key} must be a finite number.")
    return float(value)


def _layer_numbers(key: str, config: Mapping[str, Any]) -> Sequence[int]:
    value = config.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(number, int) for number in value):
        raise CheckpointError(f"config.json has {key} = {_shortly(value)}.", hint=f"{key} must list layer numbers.")
    return value


def _sparse(family: Family, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of Geometry that describe experts; nothing for a dense family."""
    if family.experts is None:
        return {}
    said = {key: config[key] for key in family.experts.counts if config.get(key) is not None}
    if len(set(map(repr, said.values()))) > 1:
        both = " and ".join(f"{key} = {_shortly(value)}" for key, value in said.items())
        raise CheckpointError(f"config.json has {both}.", hint="Give one number of experts.")
    key = next(iter(said), family.experts.counts[0])
    step = _positive(config, "decoder_sparse_step", default=1)
    dense = set(_layer_numbers("mlp_only_layers", config))
    return {
        "experts": _positive(config, key),
        "active_experts": _positive(config, "num_experts_per_tok"),
        "expert_intermediate": _positive(config, family.experts.width),
        "sparse": frozenset(n for n in range(layers) if n not in dense and (n + 1) % step == 0),
    }


def layer_prefix(layer: int) -> str:
    """Prefix of one decoder layer's tensor names; the same in every family of the table."""
    return f"model.layers.{layer}."
