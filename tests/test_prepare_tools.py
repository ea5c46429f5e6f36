"""Shared by the tests of `prepare`: real tiny transformers models in memory, a real tokenizer, easy pools. No tests."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sspcompile.families import geometry_of
from sspcompile.model.decoder import LoadedModel
from sspcompile.request.domains import DomainPool

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
DOMAINS = {
    "chemistry": ("acid", "atom", "bond", "salt", "gas", "metal"),
    "history": ("king", "war", "treaty", "empire", "queen", "siege"),
    "math": ("sum", "prime", "root", "angle", "proof", "graph"),
}
OTHER = ("goal", "match", "team", "coach", "song", "violin")
FILLER = ("what", "is", "the", "of", "a", "tell", "me", "about", "and", "please", "?")
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<user>", "<model>")
WORDS = (*SPECIAL, *FILLER, *(w for words in DOMAINS.values() for w in words), *OTHER)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def word_tokenizer(*, template: str | None = None, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word; puts BOS in front of every text (and EOS behind it with `add_eos`), as Llama's does."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A" + (" </s>" if add_eos else ""), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<model>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny(
    family: str = "llama",
    *,
    layers: int = 3,
    hidden: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    o_bias: bool = False,
    seed: int = 0,
    template: str | None = None,
    scale: float = 0.3,
) -> LoadedModel:
    kwargs = {
        "vocab_size": len(WORDS),
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "max_position_embeddings": 128,
        "initializer_range": scale,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family in ("llama", "qwen3"):
        kwargs["attention_bias"] = o_bias
    config = CONFIGS[family](**kwargs)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    geometry = geometry_of(config.to_dict())
    return LoadedModel(model, word_tokenizer(template=template), geometry, Path("/nowhere"), f"{family}-{seed}")


def pool_of(name: str, words: tuple[str, ...], count: int = 24, seed: int = 0) -> DomainPool:
    rng = np.random.default_rng([seed, len(name)])
    prompts: list[str] = []
    while len(prompts) < count:
        a, b, c = rng.choice(words, 3, replace=False)
        filler = " ".join(rng.choice(FILLER[:-1], int(rng.integers(2, 5))))
        text = f"{filler} {a} {b} and {c} ?"
        if text not in prompts:
            prompts.append(text)
    described = tuple(f"please tell me about {a} and {b}" for a, b in itertools.pairwise(words))
    return DomainPool(name, described[0], described, tuple(prompts))


def pools(count: int = 24) -> tuple[DomainPool, ...]:
    return tuple(pool_of(name, words, count) for name, words in DOMAINS.items())


def outside(count: int = 12) -> tuple[DomainPool, ...]:
    return (pool_of("leisure", OTHER, count),)
