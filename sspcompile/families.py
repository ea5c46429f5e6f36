"""Facts per architecture, as a table: what the tensors are called, which class hosts a uniform cut, what is refused.

Adding a family is one row here and one row in the tests. Nothing in this module touches weights or imports torch;
`checkpoint.tensors` turns a geometry into names and shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sspcompile.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Linear:
    """One matrix of an MLP: its name, and [rows, columns] as names of sizes (see `tensors.size_of`)."""

    name: str
    rows: str
    columns: str


GATED = (
    Linear("mlp.gate_proj", "intermediate", "hidden"),
    Linear("mlp.up_proj", "intermediate", "hidden"),
    Linear("mlp.down_proj", "hidden", "intermediate"),
)
FUSED_GATED = (
    Linear("mlp.gate_up_proj", "twice_intermediate", "hidden"),
    Linear("mlp.down_proj", "hidden", "intermediate"),
)
PLAIN = (Linear("mlp.c_fc", "intermediate", "hidden"), Linear("mlp.c_proj", "hidden", "intermediate"))


@dataclass(frozen=True)
class Experts:
    """A sparse MLP: `router` scores the experts, `expert` is the name of one (with its number), `parts` its matrices.

    `counts`: the configuration keys that may hold the number of experts; `width`: the one with their inner size.
    In memory transformers 5 calls the router `mlp.gate` and stacks the experts' parts: `mlp.experts.gate_up_proj`
    holds those named in `gate_up` one above the other, `mlp.experts.down_proj` those named `down`.
    """

    router: str
    expert: str
    parts: tuple[Linear, ...]
    counts: tuple[str, ...]
    width: str
    gate_up: tuple[str, str]
    down: str


MIXTRAL_EXPERTS = Experts(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}",
    parts=(
        Linear("w1", "expert_intermediate", "hidden"),
        Linear("w2", "hidden", "expert_intermediate"),
        Linear("w3", "expert_intermediate", "hidden"),
    ),
    counts=("num_local_experts",),
    width="intermediate_size",
    gate_up=("w1", "w3"),
    down="w2",
)
QWEN_EXPERTS = Experts(
    router="mlp.gate",
    expert="mlp.experts.{}",
    parts=(
        Linear("gate_proj", "expert_intermediate", "hidden"),
        Linear("up_proj", "expert_intermediate", "hidden"),
        Linear("down_proj", "hidden", "expert_intermediate"),
    ),
    # transformers 5 writes num_local_experts, 4.57 num_experts.
    counts=("num_experts", "num_local_experts"),
    width="moe_intermediate_size",
    gate_up=("gate_proj", "up_proj"),
    down="down_proj",
)


def _nothing(_head_dim: int) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture whose attention is q/k/v/o projections with rotary positions inside.

    `qkv_bias`, `o_bias`, `mlp_bias`: the configuration key that switches the biases on, or a fixed truth.
    `fused_qkv`: one qkv_proj, rows of q, then k, then v. `qk_norm`: q_norm and k_norm, each over one head.
    `norms`: the norms of a layer; `residual_norm` is the one whose input is the residual stream after attention.
    `normed_attention`: the output of o_proj passes a norm of its own before it joins the residual stream, so that no
    head's share in the stream is linear. `residual_multiplier`: the key of the factor that it is multiplied by.
    `tied` and `head_dim`: what the family's class takes when config.json is silent.
    `attention`: the implementation of transformers that computes this family as it is meant.
    `hidden_must_divide`: the class refuses head counts that do not divide hidden_size. `reads_heads`: its configuration
    looks at the global head count while it is built. `longrope_by_heads`: it expects as many factors of scaled rotary
    positions as follow from hidden_size / heads, so that no other head count can be stated.
    `hosts`: other families whose stock class holds this one's weights, the best first; `neutral(head_dim)` are the
    settings under which this family, as a host, computes plain attention; `own_keys` leave the configuration when
    another family hosts it. `window`: the key that switches sliding windows on, which no host has in the same layers.
    """

    model_type: str
    architecture: str
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    fused_qkv: bool = False
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    residual_norm: str = "post_attention_layernorm"
    normed_attention: bool = False
    residual_multiplier: str | None = None
    mlp: tuple[Linear, ...] = GATED
    experts: Experts | None = None
    tied: bool = False
    head_dim: int | None = None
    attention: str = "sdpa"
    hidden_must_divide: bool = False
    reads_heads: bool = False
    longrope_by_heads: bool = False
    hosts: tuple[str, ...] = ()
    neutral: Callable[[int], Mapping[str, Any]] = _nothing
    own_keys: tuple[str, ...] = ()
    window: str | None = None


FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
# What Gemma 2 and 3 have in common: two norms around each block, so the residual stream is seen by the second pair.
SANDWICHED: Mapping[str, Any] = {
    "norms": FOUR_NORMS,
    "residual_norm": "pre_feedforward_layernorm",
    "normed_attention": True,
    "tied": True,
    "head_dim": 256,
    "hidden_must_divide": True,
    "reads_heads": True,
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        # transformers 5 rejects a LlamaConfig whose hidden_size is not a multiple of num_attention_heads even when
        # head_dim is given; Mistral has the same tensors and the same forward with `sliding_window: null`.
        Family(
            "llama",
            "LlamaForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            hidden_must_divide=True,
            reads_heads=True,
            hosts=("mistral", "seed_oss", "granite"),
            own_keys=("attention_bias", "mlp_bias", "pretraining_tp"),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            hosts=("seed_oss", "granite"),
            window="sliding_window",
            own_keys=("sliding_window",),
            neutral=lambda _: {"sliding_window": None},
        ),
        Family("ministral", "MinistralForCausalLM"),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            hosts=("seed_oss", "granite"),
            window="use_sliding_window",
            own_keys=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, head_dim=128
        ),
        Family("phi3", "Phi3ForCausalLM", fused_qkv=True, mlp=FUSED_GATED, reads_heads=True, longrope_by_heads=True),
        Family(
            "gemma", "GemmaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", tied=True, head_dim=256
        ),
        Family(  # sdpa knows no soft capping of scores
            "gemma2",
            "Gemma2ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            attention="eager",
            **SANDWICHED,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            **SANDWICHED,
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            residual_multiplier="residual_multiplier",
            neutral=lambda head_dim: {
                "attention_multiplier": head_dim**-0.5,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            tied=True,
        ),
        Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            qkv_bias="use_bias",
            o_bias="use_bias",
            mlp_bias="use_bias",
            norm_bias=True,
            mlp=PLAIN,
            tied=True,
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_out_bias",
            mlp_bias="mlp_bias",
            head_dim=128,
            neutral=lambda _: {"attention_dropout": 0.0, "residual_dropout": 0.0},
        ),
        Family("mixtral", "MixtralForCausalLM", experts=MIXTRAL_EXPERTS),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            experts=QWEN_EXPERTS,
        ),
    )
}

SPANS_HEADS = "its q_norm spans all heads, so removing one changes the others"
DERIVED_HEAD_DIM = "its class derives the head size from hidden_size / heads and cannot hold fewer heads"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("olmo2", "olmo3"), SPANS_HEADS),
    **dict.fromkeys(
        ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "stablelm", "falcon", "helium", "bitnet"), DERIVED_HEAD_DIM
    ),
    "gemma3": "it carries a vision tower; its text part, saved by itself as gemma3_text, can be cut",
}
# Those that the ONNX export has a graph for, each compared with transformers in its tests.
ONNX_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3", "seed_oss")
# Families whose switch is on unless config.json says otherwise.
ON_BY_DEFAULT = frozenset({("starcoder2", "use_bias"), ("seed_oss", "attention_bias"), ("mistral", "sliding_window")})


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder as its configuration states them; counts of heads are per layer and equal in all layers.

    `sparse`: the layers whose MLP is `experts` experts of `expert_intermediate` each, `active_experts` of which a
    token visits. `windowed`: some layers attend through a sliding window that the family can switch on.
    `fixed_heads`: the stock class can state no other number of query heads (see Family.longrope_by_heads).
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
    return bool(config.get(rule, (family.model_type, rule) in ON_BY_DEFAULT))


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
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise CheckpointError(
            f"config.json has hidden_size {hidden} for {heads} heads and no head_dim.", hint="Set head_dim."
        )
    layers = _positive(config, "num_hidden_layers")
    return Geometry(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", default=family.head_dim or hidden // heads),
        vocab=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=_switch(family, family.qkv_bias, config),
        o_bias=_switch(family, family.o_bias, config),
        mlp_bias=_switch(family, family.mlp_bias, config),
        # 4.x writes torch_dtype, 5.x writes dtype.
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        residual_multiplier=_multiplier(family.residual_multiplier, config),
        windowed=_switch(family, family.window or False, config),
        fixed_heads=family.longrope_by_heads and _scaled_by_factors(config),
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


def _scaled_by_factors(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return isinstance(rope, Mapping) and rope.get("short_factor") is not None


def _sparse(family: Family, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of Geometry that describe experts; nothing for a dense family."""
    if family.experts is None:
        return {}
    key = next((key for key in family.experts.counts if config.get(key) is not None), family.experts.counts[0])
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
