"""Real checkpoints for tests: random weights from a configuration and a seed, a real tokenizer, files on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCAB = 260


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


def make_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random model; biases and norms get values too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(shape))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "norm" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.1)
    size = {"max_shard_size": shape.shard_bytes} if shape.shard_bytes else {}
    model.to(shape.dtype).save_pretrained(folder, **size)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # A class of transformers 5 that 4.57 does not know.
    tokenizer_config = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(json.dumps(settings, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
