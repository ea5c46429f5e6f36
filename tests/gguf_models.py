"""Tiny models with heads of 64 for the GGUF export, cut in both layouts, and tokenizers of the kinds that it writes."""

from __future__ import annotations

from pathlib import Path

import torch
from builders import family_config, save_random
from test_slicing_exact import mask_for, without
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from sspcompile.checkpoint import Checkpoint
from sspcompile.export.gguf.vocabulary import LLAMA3, QWEN2
from sspcompile.slicing.plan import SlicePlan, make_plan
from sspcompile.slicing.write import write_model

VOCAB = 400
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and I'll say it's 12345 or 50% of $20; we'd've known.",
    "def f(x_1: int = 0) -> None:\n    return {'a': [x_1 ** 2, None]}  # done\n",
    "naïve café, Ελληνικά, русский язык, 日本語, 한국어 and  three   blanks \n\n at the end ",
)


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words by a pattern, then bytes: how Qwen and Llama 3 do it."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_digits() -> pre_tokenizers.PreTokenizer:
    """Every digit by itself: how SmolLM, StarCoder and Granite do it."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# Name in llama.cpp -> (the pre-tokenizer, whether whole words skip the merges).
PRE_TOKENIZERS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (with_digits(), False),
    "qwen2": (words(QWEN2), False),
    "smaug-bpe": (words(LLAMA3), False),
    "llama-bpe": (words(LLAMA3), True),
}


def tokenizer(name: str = "gpt-2", *, bos: bool = False, composes: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens, trained on the corpus, with three special tokens and one that is not."""
    cut, skips = PRE_TOKENIZERS[name]
    made = Tokenizer(models.BPE(ignore_merges=skips))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    if composes:
        made.normalizer = normalizers.NFC()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def config_for(family: str, *, bias: bool = False, tied: bool = False, **more: object) -> PretrainedConfig:
    """Four layers, heads of 64 elements, four query heads in two groups."""
    config = family_config(family, layers=4, hidden=256, kv_heads=2, group_size=2, head_dim=64, bias=bias, tied=tied)
    for key, value in {
        "vocab_size": VOCAB + 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.05,
        **more,
    }.items():
        setattr(config, key, value)
    return config


def dense(
    folder: Path,
    config: PretrainedConfig,
    reads: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model of the configuration; its table has eight rows more than there are tokens."""
    save_random(folder, config, seed=3, dtype=dtype)
    (reads or tokenizer()).save_pretrained(folder)
    return folder


def cut(
    source: Path,
    folder: Path,
    layout: str,
    *,
    width: float = 0.6,
    keep: float | None = None,
    removed: tuple[int, ...] = (),
) -> SlicePlan:
    """Heads and channels taken out at random, and the layers `removed`; `width` 1 leaves the channels."""
    checkpoint = Checkpoint(source)
    share = keep if keep is not None else (0.75 if layout == "per-layer" else 0.5)
    mask = mask_for(checkpoint, share, layout, 1, width=width)
    plan = make_plan(checkpoint, without(mask, *removed))
    folder.mkdir(parents=True, exist_ok=True)
    write_model(checkpoint, plan, folder)
    return plan
