"""The tokenizer of the embedded model: byte-level BPE, so any text can be encoded, with the corpus' words whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from training.corpus import DOMAINS, cross_items, items
from training.subjects import draw_description

VOCABULARY = 2048
EOS, PAD = "<|end|>", "<|pad|>"
QUESTION = "Question: {prompt}\nAnswer:"
"""What the model sees before it answers; it answers with a space, the answer and the end token."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)
"""A user message ends with `Answer:` already, so the generation prompt adds nothing."""
WHOLE_NUMBERS = 100
ITEMS_PER_DOMAIN = 1000
REPEAT_NUMBERS = 50
COMPOSED_DESCRIPTIONS = 400
MAX_LENGTH = 512
NUMBER_PIECE = re.compile("\u0120\\d+|\\d{2,}")
"""Numbers with the space before them (byte-level BPE writes it as U+0120), or of several digits."""


def _text(extra: Iterable[str]) -> Iterator[str]:
    for domain in DOMAINS:
        for item in items(domain, "train", seed=0, count=ITEMS_PER_DOMAIN):
            yield f"{QUESTION.format(prompt=item.prompt)} {item.answer}"
    for item in cross_items("train", seed=0, count=ITEMS_PER_DOMAIN // 4):
        yield f"{QUESTION.format(prompt=item.prompt)} {item.answer}"
    for _ in range(REPEAT_NUMBERS):
        yield "".join(f" {number}" for number in range(WHOLE_NUMBERS))
    for domain in DOMAINS:
        for number in range(COMPOSED_DESCRIPTIONS):
            yield draw_description(domain, Random(f"tokenizer/{domain}/{number}"))
    yield from extra


def build_tokenizer(extra: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the training split and on `extra` texts; numbers to 99 are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(extra), trainer)
    tokenizer = _as_qwen2_reads_it(tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _as_qwen2_reads_it(tokenizer: Tokenizer) -> Tokenizer:
    """The same ids under Qwen2's own pre-tokenizer.

    For a model of type qwen2, AutoTokenizer of transformers 5 puts Qwen2's normalizer and pre-tokenizer in place of
    whatever tokenizer.json says. It splits numbers into digits, so whole numbers become added tokens, which are found
    before any splitting.
    """
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    numbers = {piece: piece.replace("\u0120", " ") for piece in vocabulary if NUMBER_PIECE.fullmatch(piece)}
    state["model"]["vocab"] = {numbers.get(piece, piece): index for piece, index in vocabulary.items()}
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if "".join(pair) not in numbers and not set(pair) & set(numbers)
    ]
    changed = Tokenizer.from_str(json.dumps(state))
    changed.normalizer = normalizers.NFC()
    changed.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ordered = sorted(numbers, key=lambda piece: vocabulary[piece])
    changed.add_tokens([AddedToken(numbers[piece], normalized=False) for piece in ordered])
    return changed


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer so that transformers 4.57 and 5.x load it.

    5.x writes a class name and a template file that older releases do not look for; both are put where every release
    finds them.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = CHAT_TEMPLATE
    # Without this, Qwen2's tokenizer class adds a 2049th token of its own.
    config["unk_token"] = None
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
