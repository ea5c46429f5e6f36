"""Answers that are known, scored in one forward pass: exact match and log-likelihood, teacher-forced.

Greedy decoding writes the reference, token by token and then its end, exactly when the most likely token at every
position of the reference is the reference's own: each step of decoding then has the reference so far behind it. So
exact match costs one pass over prompt and answer, and no decoding. Two token sequences can spell the same text; only
the tokenizer's own counts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from sspcompile.errors import InputError
from sspcompile.model.stored import double_device, in_double
from sspcompile.model.text import BATCH_TOKENS, MAX_TOKENS, Batch, Sentence, batches_of, replied, shortened
from sspcompile.model.vocabulary import end_id
from sspcompile.request.prompts import Prompt, messages_of

if TYPE_CHECKING:
    from sspcompile.model.decoder import LanguageModel


class Labelled(Protocol):
    """A question with its answer, or with all answers that count as right."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def answer(self) -> str | Sequence[str]: ...


@dataclass(frozen=True)
class EncodedBatch:
    """Prompts with references behind them. S positions are scored, those of `batch.score_mask` row by row."""

    batch: Batch
    targets: Tensor  # int64 [S]: the reference's token at each scored position
    reference: Tensor  # int64 [S]: the reference that each scored position belongs to


@dataclass(frozen=True)
class EncodedItems:
    """Items ready to be scored by models that share the tokenizer: encode once, score as often as wanted.

    Every alternative answer is a reference of its own; `owner` [R] names the item of each of the R references, and
    `tokens` [R] counts its tokens, the end included.
    """

    batches: tuple[EncodedBatch, ...]
    owner: np.ndarray
    tokens: np.ndarray
    count: int


@dataclass(frozen=True)
class AnswerScores:
    """Per item: whether greedy decoding writes one of its references, and the mean log-likelihood per token of the
    likeliest reference, in nats, its end token included."""

    right: np.ndarray  # bool [N]
    log_likelihood: np.ndarray  # float64 [N]

    @property
    def exact_match(self) -> float:
        """The share of right items, in [0, 1]."""
        return float(self.right.mean())


def alternatives(answer: str | Sequence[str]) -> tuple[str, ...]:
    """Every answer that counts as right."""
    return (answer,) if isinstance(answer, str) else tuple(answer)


def encode_items(
    loaded: LanguageModel,
    items: Sequence[Labelled],
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    *,
    batch_size: int | None = None,
    positions: int | None = None,
) -> EncodedItems:
    """Tokenise and batch items on the model's device. Prompts are cut as everywhere, and so far that prompt and answer
    fit `positions` tokens; answers never.

    Raises InputError for an empty prompt or answer, and for no items.
    """
    pairs = [(owner, item.prompt, text) for owner, item in enumerate(items) for text in alternatives(item.answer)]
    if len({owner for owner, _, _ in pairs}) != len(items) or not pairs:
        raise InputError("There is an item without an answer, or no item at all.", hint="Give every item an answer.")
    prompts, answers = [prompt for _, prompt, _ in pairs], [text for _, _, text in pairs]
    rows = encode_references(loaded, prompts, answers, max_tokens, positions=positions)
    batches = tuple(_with_targets(batch) for batch in batches_of(loaded, rows, batch_tokens, batch_size))
    return EncodedItems(
        batches=batches,
        owner=np.array([owner for owner, _, _ in pairs]),
        tokens=np.array([row.scored for row in rows]),
        count=len(items),
    )


def encode_references(
    loaded: LanguageModel,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    max_tokens: int = MAX_TOKENS,
    *,
    positions: int | None = None,
) -> list[Sentence]:
    """Each prompt with its answer and an end token behind it; `prompt` counts the tokens before the answer.

    Raises InputError for an empty prompt or answer, and for an answer that leaves a prompt no room in `positions`.
    """
    end = end_id(loaded.tokenizer, loaded.ends, loaded.vocab)
    found: list[Sentence] = []
    for (before, reply), prompt, answer in zip(replied(loaded, prompts, answers), prompts, answers, strict=True):
        if not before or not messages_of(prompt)[-1].content.strip() or not answer.strip():
            raise InputError(f"A prompt or its answer is empty: {prompt!r}, {answer!r}.", hint="Fill it in.")
        if end is not None and not (reply and reply[-1] in loaded.ends):
            reply = (*reply, end)
        if positions is not None and len(reply) >= positions:
            raise InputError(
                f"An answer has {len(reply)} tokens; the longest text of the models has {positions}.",
                hint="Shorten it, or leave the question out.",
            )
        ids = shortened(before, max_tokens if positions is None else min(max_tokens, positions - len(reply)))
        found.append(Sentence(ids + reply, len(ids)))
    return found


def _with_targets(batch: Batch) -> EncodedBatch:
    rows = torch.tensor(batch.rows, device=batch.input_ids.device)
    return EncodedBatch(
        batch=batch,
        # Position t is scored for the token at t + 1; a reference never ends before its last scored position.
        targets=batch.input_ids.roll(-1, dims=1)[batch.score_mask],
        reference=rows[batch.score_mask.nonzero()[:, 0]],
    )


@torch.inference_mode()
def answer_scores(loaded: LanguageModel, encoded: EncodedItems) -> AnswerScores:
    """Score every item by one forward pass over its prompt and each of its references.

    Runs the model as it is, so inside `head_gates` and `repaired` it scores the masked, repaired model.
    """
    references = len(encoded.owner)
    wrong = torch.zeros(references, dtype=torch.int64, device=loaded.device)
    total = torch.zeros(references, dtype=torch.float64, device=double_device(loaded.device))
    for part in encoded.batches:
        batch = part.batch
        logits = loaded.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask)
        wrong.index_add_(0, part.reference, (logits.argmax(-1) != part.targets).long())
        likelihood = logits.log_softmax(-1).gather(1, part.targets[:, None])[:, 0]
        total.index_add_(0, part.reference.to(total.device), in_double(likelihood))
    right = np.zeros(encoded.count, dtype=bool)
    np.logical_or.at(right, encoded.owner, wrong.cpu().numpy() == 0)
    best = np.full(encoded.count, -np.inf)
    np.maximum.at(best, encoded.owner, total.cpu().numpy() / encoded.tokens)
    return AnswerScores(right, best)
