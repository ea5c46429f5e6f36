"""Real checkpoints for tests: random weights from a configuration and a seed, a real tokenizer, files on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# The families that every property is tested with; FAMILY_SETTINGS has a row for each of the table's.
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCAB = 260
BIASED = {"attention_bias": True}
# What a small random model of a family needs beside the sizes: multipliers that are not neutral, short windows,
# experts. "bias" switches on whatever biases the family can have.
FAMILY_SETTINGS: dict[str, dict] = {
    "llama": {"bias": {**BIASED, "mlp_bias": True}},
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"bias": BIASED},
    "phi3": {},
    "gemma": {"bias": BIASED},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8, "bias": BIASED},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2, "bias": BIASED},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
        "bias": {**BIASED, "mlp_bias": True},
    },
    "smollm3": {"no_rope_layer_interval": 2, "bias": {**BIASED, "mlp_bias": True}},
    "starcoder2": {"use_bias": False, "sliding_window": 8, "bias": {"use_bias": True}},
    "seed_oss": {"attention_bias": False, "bias": {**BIASED, "attention_out_bias": True, "mlp_bias": True}},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "bias": BIASED,
    },
}


@dataclass(frozen=True)
class Shape:
    """What a random model looks like. `bias` applies where the family has a switch for attention biases."""

    family: str = "qwen2"
    layers: int = 2
    hidden: int = 32
    kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 8
    bias: bool = False
    tied: bool = False
    shard_bytes: int | None = None
    dtype: torch.dtype = torch.float32
    rope_scaling: bool = False


def config_of(shape: Shape) -> PretrainedConfig:
    kwargs = {
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": 48,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.kv_heads * shape.group_size,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    if shape.family in ("llama", "qwen3"):
        kwargs["attention_bias"] = shape.bias
    if shape.family == "mistral":
        kwargs["sliding_window"] = None
    theta = 50000.0
    if shape.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    else:
        rope = {"rope_type": "default", "rope_theta": theta}
    return CONFIGS[shape.family](**kwargs, rope_parameters=rope)


def family_config(
    family: str,
    *,
    layers: int = 3,
    hidden: int = 64,
    kv_heads: int = 4,
    group_size: int = 2,
    head_dim: int = 16,
    bias: bool = False,
    tied: bool = False,
) -> PretrainedConfig:
    """A small configuration of any family of the table; positions are the family's default."""
    settings = dict(FAMILY_SETTINGS[family])
    biases = settings.pop("bias", {})
    return AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group_size,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        **{**settings, **(biases if bias else {})},
    )


def expert_config(family: str, **sizes: int | bool) -> PretrainedConfig:
    """A small configuration of a family whose every layer has experts."""
    config = family_config(family, **sizes)
    if family == "qwen3_moe":
        config.mlp_only_layers = []
    return config


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and bos, eos, pad; encodes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    vocab |= {"<s>": 256, "</s>": 257, "<pad>": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def stated(path: Path, count: int = 64, **options: object) -> Path:
    """A recipe of sums that says itself what it is about, so that no pool is read to find out. 64 prompts are enough to
    choose, guard and judge alone (`request/splits.py`). `options` are those of the build.
    """
    scenario = {
        "prompts": [f"How much is {n} times {n + 3} plus {7 * n}?" for n in range(count)],
        "domains": {"math": 1},
    }
    recipe = {"schema_version": 1, "name": path.stem, "description": "Sums.", "scenario": scenario}
    path.write_text(json.dumps(recipe | options))
    return path


def make_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random model; biases and norms get values too, so that a lost one shows."""
    size = {"max_shard_size": shape.shard_bytes} if shape.shard_bytes else {}
    return save_random(folder, config_of(shape), seed=seed, dtype=shape.dtype, **size)


def save_random(
    folder: Path, config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object
) -> Path:
    """A random model of a configuration, with a tokenizer. `options` go to save_pretrained."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "norm" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    # A class of transformers 5 that 4.57 does not know.
    tokenizer_config = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(settings, indent=2))
    return folder
