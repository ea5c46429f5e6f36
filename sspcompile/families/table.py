"""Facts per architecture, as a table: what the tensors are called, which class hosts a uniform cut, what is refused.

Adding a family is one row here and one row in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


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
    counts=("num_local_experts", "num_experts"),
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
    # transformers 5 writes num_local_experts and takes it for the other one, 4.57 writes num_experts.
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
    another family hosts it.
    `window`: which layers have the sliding window, "every" or those that "layer_types" names; "" for a class without
    windows. `window_switch`: the key without which `sliding_window` counts for nothing. No host has windows.
    `tokenizer`: the class that transformers 5 reads every tokenizer of this type with; "" where the one that
    tokenizer_config.json names counts (see checkpoint.tokenizers).
    `partial_rotary`: positions may turn a part of each head. `scales_logits`, `caps_logits`: the class reads
    logits_scaling, final_logit_softcapping.
    `silent`: what its class in transformers 5 takes for a setting of which config.json says nothing.
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
    window: Literal["", "every", "layer_types"] = ""
    window_switch: str | None = None
    tokenizer: str = ""
    partial_rotary: bool = False
    scales_logits: bool = False
    caps_logits: bool = False
    silent: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> str:
        """The class of the decoder without its output matrix."""
        own = "TextModel" if self.model_type.endswith("_text") else "Model"
        return self.architecture.removesuffix("ForCausalLM") + own

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """The norms around the attention of a layer, which go with it where it is removed whole."""
        return self.norms[: self.norms.index(self.residual_norm)]

    @property
    def width(self) -> str:
        """The configuration key of the inner size of an MLP, or of an expert."""
        return self.experts.width if self.experts is not None else "intermediate_size"

    @property
    def down(self) -> str:
        """The matrix of the MLP that writes into the residual stream; its columns are the channels."""
        return next(linear.name for linear in self.mlp if linear.rows == "hidden")


def _silent(positions: int, kv_heads: int | None = None, /, **more: Any) -> Mapping[str, Any]:
    """The usual silent settings, `more` instead of them; None for one that the class does not have.

    `kv_heads` None: as many as query heads.
    """
    sizes = {"max_position_embeddings": positions, "num_key_value_heads": kv_heads}
    usual = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    return {key: value for key, value in {**sizes, **usual, **more}.items() if value is not None}


# The name in transformers 4.57, which 5 understands.
AS_IN_FILE = "PreTrainedTokenizerFast"
GELU = "gelu_pytorch_tanh"


FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
# Granite's; each is 1 where config.json is silent.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
# What Gemma 2 and 3 have in common: two norms around each block, so the residual stream is seen by the second pair.
SANDWICHED: Mapping[str, Any] = {
    "norms": FOUR_NORMS,
    "residual_norm": "pre_feedforward_layernorm",
    "normed_attention": True,
    "tied": True,
    "head_dim": 256,
    "hidden_must_divide": True,
    "reads_heads": True,
    "window": "layer_types",
    "caps_logits": True,
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
            silent=_silent(2048),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            hosts=("seed_oss", "granite"),
            window="every",
            own_keys=("sliding_window",),
            tokenizer=AS_IN_FILE,
            neutral=lambda _: {"sliding_window": None},
            silent=_silent(131072, 8, sliding_window=4096),
        ),
        Family(
            "ministral", "MinistralForCausalLM", window="layer_types", silent=_silent(131072, 8, sliding_window=4096)
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            hosts=("seed_oss", "granite"),
            window="layer_types",
            window_switch="use_sliding_window",
            own_keys=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
            tokenizer="Qwen2Tokenizer",
            silent=_silent(32768, 32, sliding_window=4096, max_window_layers=28),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            head_dim=128,
            window="layer_types",
            window_switch="use_sliding_window",
            silent=_silent(32768, 32, sliding_window=4096, max_window_layers=28),
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            fused_qkv=True,
            mlp=FUSED_GATED,
            reads_heads=True,
            longrope_by_heads=True,
            window="every",
            partial_rotary=True,
            silent=_silent(4096, rms_norm_eps=1e-5, original_max_position_embeddings=4096),
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            tied=True,
            head_dim=256,
            silent=_silent(8192, 16, hidden_act=GELU),
        ),
        Family(  # sdpa knows no soft capping of scores
            "gemma2",
            "Gemma2ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            attention="eager",
            silent=_silent(8192, 4, sliding_window=4096, hidden_act=None, hidden_activation=GELU),
            **SANDWICHED,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            silent=_silent(
                131072,
                4,
                sliding_window=4096,
                rope_theta=1e6,
                rope_local_base_freq=1e4,
                hidden_act=None,
                hidden_activation=GELU,
            ),
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
            scales_logits=True,
            tokenizer=AS_IN_FILE,
            silent=_silent(2048, None, **dict.fromkeys(MULTIPLIERS, 1.0)),
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            tied=True,
            window="layer_types",
            silent=_silent(32768, 4, rope_theta=2e6, no_rope_layer_interval=4),
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
            window="every",
            silent=_silent(4096, 2, hidden_act=GELU, rms_norm_eps=None, norm_epsilon=1e-5, use_bias=True),
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_out_bias",
            mlp_bias="mlp_bias",
            head_dim=128,
            neutral=lambda _: {"attention_dropout": 0.0, "residual_dropout": 0.0},
            silent=_silent(524288, 8, attention_bias=True),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            experts=MIXTRAL_EXPERTS,
            window="every",
            silent=_silent(131072, 8, rms_norm_eps=1e-5, rope_theta=1e6),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            experts=QWEN_EXPERTS,
            window="every",
            window_switch="use_sliding_window",
            silent=_silent(32768, 4, sliding_window=4096),
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
