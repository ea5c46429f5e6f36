"""From prompts to padded batches: the one path that text takes, offline for the pools and online for a scenario.

Sequences are right-padded: with causal attention a real token never sees padding behind it. Whoever changes what this
module or `chat` makes of a prompt raises TEXT_VERSION, because toolkits learned from the old text no longer apply
(answers are a scenario's alone: no toolkit learned from them). What the user chooses (`Rendering`) and the template
itself are told apart by `chat.template_digest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sspcompile.errors import InputError
from sspcompile.model import journal
from sspcompile.model.chat import PLAIN, Rendering, render, replies, template_of
from sspcompile.model.parallel import current
from sspcompile.model.vocabulary import demand_rows, padding_id
from sspcompile.progress import Steps, no_steps
from sspcompile.request.documents import shown
from sspcompile.request.prompts import Passage, Prompt, answer_of, asked_of, messages_of, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sspcompile.model.decoder import LanguageModel, LoadedModel

TEXT_VERSION = 1
MAX_TOKENS = 512
# Where prompts have no answers, what the dense model writes is all that is scored, repaired and judged. Of 16 tokens
# SmolLM2-135M learned how replies begin: cut to nine tenths for word problems without answers its replies of 128
# tokens had a KL of .084, of 64 tokens .049 (benchmarks/replies.py).
CONTINUATION_TOKENS = 64
# Of a reference answer; what stands behind them says little more about the heads.
ANSWER_TOKENS = 128
# Of a passage: as many as a prompt and its answer often have together.
PASSAGE_TOKENS = 256
# The first ones of a passage are foretold from next to nothing, and are not scored.
OPENING_TOKENS = 8
BATCH_TOKENS = 4096  # padding included
# Of a batch that is run backward: larger ones take more memory and no less time.
GRADIENT_TOKENS = 1024
NOTHING = -1  # no token
# Logits of one batch stay under 2^26 numbers (256 MiB in fp32) however large the vocabulary is.
BATCH_LOGITS = 2**26


@dataclass(frozen=True)
class Sentence:
    """Token ids of one prompt, with the continuation behind it when there is one. `prompt` counts prompt tokens,
    `reference` says that the continuation is an answer that was given, not one that the model wrote. Of a passage all
    but the first few tokens are such a continuation.
    """

    ids: tuple[int, ...]
    prompt: int
    reference: bool = False

    @property
    def scored(self) -> int:
        """Number of positions whose next-token distribution counts."""
        return max(1, len(self.ids) - self.prompt)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length. All tensors are [B, T] on the model's device."""

    rows: tuple[int, ...]  # place of each sequence in the caller's list of prompts
    input_ids: Tensor  # int64
    attention_mask: Tensor  # int64, 1 at real tokens
    score_mask: Tensor  # bool: the last prompt token, and the continuation tokens except the last


def sentences(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int, rendering: Rendering = PLAIN
) -> list[Sentence]:
    """Tokenised prompts without their answers, in the caller's order, cut as by `shortened`; passages whole, up to
    PASSAGE_TOKENS.

    Raises InputError for a prompt without any token, and what `render` raises.
    """
    if not prompts:
        return []
    prompts = [asked_of(prompt) for prompt in prompts]
    if blank := [prompt for prompt in prompts if not messages_of(prompt)[-1].content.strip()]:
        raise InputError(f"A prompt is empty: {blank[0]!r}.", hint="Remove it, or write a question.")
    found = []
    for prompt, ids in zip(prompts, _encoded(tokenizer, prompts, rendering), strict=True):
        if not ids:
            raise InputError(
                f"The tokenizer leaves nothing of the prompt {shown(told(prompt))}.",
                hint="Remove it, or use the tokenizer that the model was trained with.",
            )
        if isinstance(prompt, Passage):
            found.append(_read(ids[: min(max_tokens, PASSAGE_TOKENS)]))
            continue
        ids = shortened(ids, max_tokens)
        found.append(Sentence(ids, len(ids)))
    return found


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], rendering: Rendering
) -> list[tuple[int, ...]]:
    """Whole token ids: of passages as they stand, of prompts as they are rendered."""
    passages = [row for row, prompt in enumerate(prompts) if isinstance(prompt, Passage)]
    others = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, Passage)]
    found: dict[int, tuple[int, ...]] = {}
    for rows, way in ((passages, Rendering(raw=True)), (others, rendering)):
        if rows:
            texts = render(tokenizer, [prompts[row] for row in rows], way)
            found |= zip(rows, token_ids(tokenizer, texts, way), strict=True)
    return [found[row] for row in range(len(prompts))]


def _read(ids: tuple[int, ...]) -> Sentence:
    opening = min(OPENING_TOKENS, max(1, len(ids) // 2))
    return Sentence(ids, opening, reference=len(ids) > opening)


def demand_readable(loaded: LanguageModel, prompts: Sequence[Prompt], max_tokens: int = MAX_TOKENS) -> None:
    """Raise InputError for a prompt that the model cannot read, before anything heavy starts."""
    for item in sentences(loaded.tokenizer, prompts, max_tokens, loaded.rendering):
        demand_rows(loaded.tokenizer, item.ids, loaded.vocab)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rendering: Rendering = PLAIN
) -> list[tuple[int, ...]]:
    """Token ids of texts that went through `render`, whole."""
    # A chat template writes the special tokens itself; adding them again would put two BOS in front.
    templated = template_of(tokenizer, rendering) is not None
    found = []
    for ids in tokenizer(list(texts), add_special_tokens=not templated, padding=False)["input_ids"]:
        # Some tokenizers close every text with EOS: the model would be asked what follows the end.
        while not templated and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        found.append(tuple(ids))
    return found


def shortened(ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """At most `max_tokens` ids: a longer text keeps its first token (where attention likes to rest) and its last ones,
    so that the question and the template's generation prompt survive."""
    if len(ids) <= max_tokens:
        return ids
    return (ids[0], *ids[len(ids) - (max_tokens - 1) :]) if max_tokens > 1 else ids[-1:]


def batches_of(
    loaded: LanguageModel, items: Sequence[Sentence], batch_tokens: int = BATCH_TOKENS, batch_size: int | None = None
) -> list[Batch]:
    """Batches sorted by length, each with at most `batch_tokens` tokens and a bounded number of scored logits.

    `batch_size` bounds the number of sequences too. Raises InputError for a token that the model has no row for.
    """
    for item in items:
        demand_rows(loaded.tokenizer, item.ids, loaded.vocab)
    scored_limit = max(1, BATCH_LOGITS // loaded.vocab)
    order = sorted(range(len(items)), key=lambda row: (len(items[row].ids), row))
    groups: list[list[int]] = []
    scored = 0
    for row in order:
        # Sorted ascending: the newest sequence is the longest and fixes the padded width.
        width = len(items[row].ids)
        scored += items[row].scored
        full = bool(groups) and len(groups[-1]) == batch_size
        if not groups or full or (len(groups[-1]) + 1) * width > batch_tokens or scored > scored_limit:
            groups.append([])
            scored = items[row].scored
        groups[-1].append(row)
    return [_pad(loaded, [items[row] for row in group], tuple(group)) for group in groups]


def _pad(loaded: LanguageModel, items: Sequence[Sentence], rows: tuple[int, ...]) -> Batch:
    width = max(len(item.ids) for item in items)
    pad = padding_id(loaded.tokenizer, loaded.vocab)
    place = torch.arange(width)
    length, first, scored = (
        torch.tensor(column)[:, None]
        for column in zip(*((len(item.ids), item.prompt - 1, item.scored) for item in items), strict=True)
    )
    # One tensor from one list: row by row, padding would cost as much as tokenising.
    ids = torch.tensor([[*item.ids, *(pad,) * (width - len(item.ids))] for item in items])
    mask, score = (place < length).long(), (place >= first) & (place < first + scored)
    device = loaded.device
    return Batch(rows, ids.to(device), mask.to(device), score.to(device))


def encode(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_tokens: int = MAX_TOKENS, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Prompts as batches; `score_mask` marks the last prompt token of each."""
    return batches_of(loaded, sentences(loaded.tokenizer, prompts, max_tokens, loaded.rendering), batch_tokens)


def continued(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    new_tokens: int = CONTINUATION_TOKENS,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Steps = no_steps,
) -> list[Sentence]:
    """Prompts with their reference answers behind them, or the dense model's own greedy continuations where there are
    none, and passages as they are, in the caller's order.

    A continuation stops at an end-of-sequence token and keeps it, so that *when to stop* is scored too; so does an
    answer, of which ANSWER_TOKENS are read. Without `new_tokens` the model continues nothing.
    """
    items = sentences(loaded.tokenizer, prompts, max_tokens, loaded.rendering)
    world, answers = current(), _answers(loaded, prompts, ANSWER_TOKENS)
    unanswered = [row for row, prompt in enumerate(prompts) if row not in answers and not isinstance(prompt, Passage)]
    if new_tokens < 1:
        unanswered = []
    batches = batches_of(loaded, [items[row] for row in unanswered], batch_tokens)
    kept = journal.current().rows("continuations", loaded, [batches, new_tokens])
    share = world.share(range(len(batches)))
    own: dict[int, tuple[int, ...]] = {}
    for done, number in enumerate(share, 1):
        rows = [unanswered[place] for place in batches[number].rows]
        write = partial(_continuations, loaded, [items[row] for row in rows], new_tokens)
        own |= zip(rows, (tuple(tail[tail != NOTHING].tolist()) for tail in kept.of(number, write)), strict=True)
        progress(done, len(share))
    tails = answers | world.union(own)
    return [
        Sentence(item.ids + tails[row], item.prompt, row in answers) if row in tails else item
        for row, item in enumerate(items)
    ]


def with_references(loaded: LanguageModel, prompts: Sequence[Prompt], max_tokens: int = MAX_TOKENS) -> list[Sentence]:
    """Prompts with their reference answers behind them, whole, in the caller's order; a prompt without one is alone."""
    items, answers = sentences(loaded.tokenizer, prompts, max_tokens, loaded.rendering), _answers(loaded, prompts, None)
    return [
        Sentence(item.ids + answers[row], item.prompt, reference=True) if row in answers else item
        for row, item in enumerate(items)
    ]


def _answers(loaded: LanguageModel, prompts: Sequence[Prompt], most: int | None) -> dict[int, tuple[int, ...]]:
    """Token ids of the reference answers, by the place of their prompts."""
    given = {row: answer for row, prompt in enumerate(prompts) if (answer := answer_of(prompt)) is not None}
    behind = replied(loaded, [asked_of(prompts[row]) for row in given], [*given.values()])
    # An answer of which the tokenizer leaves nothing is none.
    return {row: ids[:most] for row, (_, ids) in zip(given, behind, strict=True) if ids}


def replied(
    loaded: LanguageModel, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of each prompt, whole, and of its answer behind it: as the model writes them when it decodes from the
    prompt, up to the first end token where the chat template closes the answer with one.
    """
    if not prompts:
        return []
    tokenizer, rendering = loaded.tokenizer, loaded.rendering
    opened = render(tokenizer, prompts, rendering)
    behind = replies(tokenizer, prompts, opened, answers, rendering)
    closed = [text + reply for text, reply in zip(opened, behind, strict=True)]
    found = []
    encoded = (token_ids(tokenizer, texts, rendering) for texts in (opened, closed))
    for before, whole, reply in zip(*encoded, behind, strict=True):
        if whole[: len(before)] == before:
            # Many tokenizers put a space in front of a text that stands alone; behind a prompt there is none.
            ids = whole[len(before) :]
        else:
            # The last token of the prompt grew into the answer. Decoding starts from the prompt's own tokens.
            ids = tuple(tokenizer(reply, add_special_tokens=False)["input_ids"])
        # Nobody decodes what a template writes behind the end.
        end = next((place + 1 for place, token in enumerate(ids) if token in loaded.ends), None)
        found.append((before, ids[:end]))
    return found


def _continuations(loaded: LoadedModel, items: Sequence[Sentence], new_tokens: int) -> np.ndarray:
    """`greedy` as an array [B, new_tokens] int64, NOTHING behind the end of each."""
    found = np.full((len(items), new_tokens), NOTHING, dtype=np.int64)
    for row, tail in zip(found, greedy(loaded, items, new_tokens), strict=True):
        row[: len(tail)] = tail
    return found


def with_continuations(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    new_tokens: int = CONTINUATION_TOKENS,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Batch]:
    """`continued` as batches; `score_mask` marks the last prompt token and the continuation except its last token."""
    items = continued(loaded, prompts, new_tokens, max_tokens, batch_tokens)
    return batches_of(loaded, items, batch_tokens)


def greedy(loaded: LanguageModel, items: Sequence[Sentence], new_tokens: int) -> list[tuple[int, ...]]:
    """At most `new_tokens` tokens behind each sentence, the end token included where one was written.

    Left-padded, unlike everything else here, so that the newest token of all sequences stands in the last column.
    """
    width = max(len(item.ids) for item in items)
    pad = padding_id(loaded.tokenizer, loaded.vocab)
    ids = torch.tensor([[pad] * (width - len(item.ids)) + list(item.ids) for item in items])
    mask = torch.tensor([[0] * (width - len(item.ids)) + [1] * len(item.ids) for item in items])
    return [tuple(tail) for tail in loaded.continuations(ids, mask, new_tokens)]
