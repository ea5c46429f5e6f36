"""Facts per architecture, as a table: what the tensors are called, which class hosts a uniform cut, what is refused.

Adding a family is one row here and one row in the tests. Nothing in this module touches weights or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sspcompile.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One architecture whose attention is q/k/v/o projections with rotary positions inside.

    `qkv_bias`, `o_bias`, `mlp_bias`: the configuration key that switches the biases on, or a fixed truth.
    `uniform_host`: the stock architecture which holds a uniform cut losslessly when the family's own class
    refuses the head count (see `uniform_host_for`).
    """

    model_type: str
    architecture: str
    qkv_bias: str | bool
    o_bias: str | bool
    mlp_bias: str | bool = False
    qk_norm: bool = False
    hidden_must_divide: bool = False
    uniform_host: str | None = None


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        # transformers 5 rejects a LlamaConfig whose hidden_size is no multiple of num_attention_heads even when
        # head_dim is given; Mistral has the same tensors and the same forward with `sliding_window: null`.
        Family(
            "llama", "LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
            hidden_must_divide=True, uniform_host="mistral",
        ),
        Family("mistral", "MistralForCausalLM", qkv_bias=False, o_bias=False),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, o_bias=False),
        Family("qwen3", "Qwen3ForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True),
    )
}

REFUSED: Mapping[str, str] = {
    "olmo2": "its q_norm spans all heads, so removing one changes the others",
    "olmo3": "its q_norm spans all heads, so removing one changes the others",
    "gpt2": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "gpt_neox": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "gptj": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "opt": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "bloom": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "stablelm": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "falcon": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "helium": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
    "bitnet": "its class derives the head size from hidden_size / heads and cannot hold fewer heads",
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder as its configuration states them; counts of heads are per layer and equal in all layers."""

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

    @property
    def group_size(self) -> int:
        """Query heads per key/value head in the dense model."""
        return self.heads // self.kv_heads

    @property
    def total_heads(self) -> int:
        return self.layers * self.heads


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


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has {key} = {value!r}.", hint=f"{key} must be a whole number of at least 1."
        )
    return value


def _switch(rule: str | bool, config: Mapping[str, Any]) -> bool:
    return rule if isinstance(rule, bool) else bool(config.get(rule, False))


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Read the sizes from a configuration. Raises CheckpointError or UnsupportedModelError."""
    family = family_of(config)
    if config.get("per_layer_config"):
        raise UnsupportedModelError(
            "This checkpoint is a per-layer cut already.", hint="Build from the dense model that it was cut from."
        )
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    kv_heads = _positive(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} query heads for {kv_heads} key/value heads.",
            hint="num_attention_heads must be a multiple of num_key_value_heads.",
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"config.json has hidden_size {hidden} for {heads} heads and no head_dim.", hint="Set head_dim."
        )
    return Geometry(
        family=family,
        layers=_positive(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", default=hidden // heads),
        vocab=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=_switch(family.qkv_bias, config),
        o_bias=_switch(family.o_bias, config),
        mlp_bias=_switch(family.mlp_bias, config),
        # 4.x writes torch_dtype, 5.x writes dtype.
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def uniform_host_for(geometry: Geometry, heads: int) -> Family:
    """The family whose stock class holds `heads` query heads in every layer of this model without custom code.

    Raises UnsupportedModelError when there is none.
    """
    if not geometry.family.hidden_must_divide or geometry.hidden % heads == 0:
        return geometry.family
    return _other_host(geometry, f"{heads} heads at hidden_size {geometry.hidden}")


def per_layer_host_for(geometry: Geometry) -> Family:
    """The family whose classes the per-layer class extends. Raises UnsupportedModelError when there is none."""
    if not geometry.family.hidden_must_divide:
        return geometry.family
    return _other_host(geometry, "head counts that differ by layer")


def _other_host(geometry: Geometry, what: str) -> Family:
    family = geometry.family
    if family.uniform_host is None or geometry.qkv_bias or geometry.o_bias or geometry.mlp_bias:
        raise UnsupportedModelError(
            f"{family.architecture} with biases cannot hold {what}, and no stock class with the same tensors can.",
            hint="Use another --keep with --layout uniform.",
        )
    return FAMILIES[family.uniform_host]


def layer_prefix(layer: int) -> str:
    """Prefix of one decoder layer's tensor names; the same in every family of the table."""
    return f"model.layers.{layer}."


def tensor_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the dense checkpoint, from the configuration alone."""
    g = geometry
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (g.vocab, g.hidden)}
    for layer in range(g.layers):
        p = layer_prefix(layer)
        shapes |= attention_shapes(g, p, g.heads, g.kv_heads)
        shapes |= {
            p + "mlp.gate_proj.weight": (g.intermediate, g.hidden),
            p + "mlp.up_proj.weight": (g.intermediate, g.hidden),
            p + "mlp.down_proj.weight": (g.hidden, g.intermediate),
            p + "input_layernorm.weight": (g.hidden,),
            p + "post_attention_layernorm.weight": (g.hidden,),
        }
        if g.mlp_bias:
            shapes |= {
                p + "mlp.gate_proj.bias": (g.intermediate,),
                p + "mlp.up_proj.bias": (g.intermediate,),
                p + "mlp.down_proj.bias": (g.hidden,),
            }
    shapes["model.norm.weight"] = (g.hidden,)
    if not g.tied:
        shapes["lm_head.weight"] = (g.vocab, g.hidden)
    return shapes


def attention_shapes(g: Geometry, prefix: str, heads: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's attention tensors with `heads` query and `kv_heads` key/value heads."""
    a = prefix + "self_attn."
    q, kv = heads * g.head_dim, kv_heads * g.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        a + "q_proj.weight": (q, g.hidden),
        a + "k_proj.weight": (kv, g.hidden),
        a + "v_proj.weight": (kv, g.hidden),
        a + "o_proj.weight": (g.hidden, q),
    }
    if g.qkv_bias:
        shapes |= {a + "q_proj.bias": (q,), a + "k_proj.bias": (kv,), a + "v_proj.bias": (kv,)}
    if g.o_bias:
        shapes[a + "o_proj.bias"] = (g.hidden,)
    if g.family.qk_norm:
        shapes |= {a + "q_norm.weight": (g.head_dim,), a + "k_norm.weight": (g.head_dim,)}
    return shapes


def with_heads(geometry: Geometry, heads: int, kv_heads: int) -> Geometry:
    """The same model with other head counts in every layer."""
    return replace(geometry, heads=heads, kv_heads=kv_heads)
