"""Two models asked the same conversations: what each answers, how likely the right answers are to it, and how far the
two diverge.

With a chat template that takes conversations every turn is asked with the conversation so far. For the answers each
model goes on from *its own* previous answers, as it would in use. Divergence and log-likelihood compare the models on
the same text, which is the conversation as *the dense model* led it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sspcompile.errors import InputError
from sspcompile.evaluate.answers import answer_scores, encode_items
from sspcompile.evaluate.questions import Conversation
from sspcompile.evaluate.recall import exact_match, keyword_recall
from sspcompile.model.chat import takes_conversations
from sspcompile.model.decoder import LanguageModel
from sspcompile.model.divergence import DivergenceAccumulator
from sspcompile.model.text import Sentence, batches_of, greedy, sentences
from sspcompile.progress import Progress, Steps
from sspcompile.request.prompts import Message, Prompt, messages_of

USUAL_TOKENS, USUAL_NEW_TOKENS, USUAL_BATCH_SIZE = 512, 32, 32
METRICS = ("exact_match", "keyword_recall", "answer_log_likelihood", "mean_kl", "top1_agreement")


@dataclass(frozen=True)
class Limits:
    """At most so many tokens of a prompt, so many written behind it, and so many sequences at once.

    `positions`: the longest text that both models can read, in tokens; None where they do not say.
    """

    max_tokens: int
    new_tokens: int
    batch_size: int
    positions: int | None = None

    def within(self, positions: int | None) -> Limits:
        """These limits, with prompts so short that they fit `positions` with their answers. Raises as `limits_for`."""
        return limits_for(positions, self.max_tokens, self.new_tokens, self.batch_size)


def limits_for(
    positions: int | None,
    max_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int = USUAL_BATCH_SIZE,
) -> Limits:
    """The limits that were asked for, so that prompt and answer fit `positions`: prompts are shortened. None stands for
    the usual limit; that of the answer is at most half of the positions.

    Raises InputError where the new tokens that were asked for leave no room for a prompt.
    """
    if positions is None:
        return Limits(max_tokens or USUAL_TOKENS, new_tokens or USUAL_NEW_TOKENS, batch_size)
    new = new_tokens or min(USUAL_NEW_TOKENS, positions // 2)
    if new >= positions:
        raise InputError(
            f"{new} new tokens leave no room for a prompt: the longest text of the models has {positions}.",
            hint=f"Give at most --max-new-tokens {positions - 1}.",
        )
    return Limits(min(max_tokens or USUAL_TOKENS, positions - new), new, batch_size, positions)


@dataclass(frozen=True)
class Asked:
    """What one model made of conversations, turn by turn in one long row over all conversations.

    `items` are the token ids read and written, `prompts` what they were made from.
    """

    prompts: tuple[Prompt, ...]
    items: tuple[Sentence, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Outcomes:
    """One value per turn [T] and metric; NaN where a turn has no answer to be measured against.

    Exact match 0 or 1, recall in [0, 1], log-likelihood and KL (from the dense model) in nats per token, agreement with
    the dense model's next token as a share of positions. `owner` [T] names the conversation of each turn.
    """

    owner: np.ndarray
    values: dict[str, np.ndarray]


def ask(loaded: LanguageModel, conversations: Sequence[Conversation], limits: Limits, progress: Steps) -> Asked:
    """Greedy answers to every turn, in rounds: the first turns of all conversations, then the second ones, ...

    Plain argmax decoding without any penalty, stopped at the end tokens.
    """
    remembers = takes_conversations(loaded.tokenizer, loaded.rendering)
    total, done = sum(len(c.turns) for c in conversations), 0
    found: dict[tuple[int, int], tuple[Prompt, Sentence, str]] = {}
    histories: list[tuple[Message, ...]] = [() for _ in conversations]
    for turn in range(max((len(c.turns) for c in conversations), default=0)):
        rows = [row for row, c in enumerate(conversations) if turn < len(c.turns)]
        asked = [conversations[row].turns[turn].prompt for row in rows]
        prompts: list[Prompt] = [
            (*histories[row], *messages_of(prompt)) if remembers and turn else prompt
            for row, prompt in zip(rows, asked, strict=True)
        ]
        items = sentences(loaded.tokenizer, prompts, limits.max_tokens, loaded.rendering)
        for batch in batches_of(loaded, items, batch_size=limits.batch_size):
            tails = greedy(loaded, [items[place] for place in batch.rows], limits.new_tokens)
            for place, tail in zip(batch.rows, tails, strict=True):
                row, item = rows[place], items[place]
                text = str(loaded.tokenizer.decode(list(tail), skip_special_tokens=True)).strip()
                found[row, turn] = (prompts[place], Sentence(item.ids + tail, item.prompt), text)
                histories[row] = (*histories[row], *messages_of(asked[place]), Message("assistant", text))
            done += len(batch.rows)
            progress(done, total)
    ordered = [found[key] for key in sorted(found)]
    return Asked(*(tuple(column) for column in zip(*ordered, strict=True)))


def compare(
    dense: LanguageModel,
    sliced: LanguageModel,
    conversations: Sequence[Conversation],
    limits: Limits,
    progress: Progress,
) -> tuple[Outcomes, Outcomes]:
    """The outcomes of the dense and of the sliced model. Raises ValueError for no conversations."""
    if not conversations:
        raise ValueError("no conversations")
    owner = np.array([row for row, c in enumerate(conversations) for _ in c.turns])
    first = ask(dense, conversations, limits, lambda done, total: progress("dense answers", done, total))
    second = ask(sliced, conversations, limits, lambda done, total: progress("sliced answers", done, total))
    kl, agreement = _divergence(dense, sliced, first, limits, lambda n, total: progress("divergence", n, total))
    likelihoods = [_likelihood(model, first, conversations, limits) for model in (dense, sliced)]
    pairs = []
    for asked, likelihood, gap in (
        (first, likelihoods[0], (np.zeros(len(owner)), np.ones(len(owner)))),
        (second, likelihoods[1], (kl, agreement)),
    ):
        exact, recall = _graded(asked, conversations)
        values = dict(zip(METRICS, (exact, recall, likelihood, *gap), strict=True))
        pairs.append(Outcomes(owner, values))
    return pairs[0], pairs[1]


def _graded(asked: Asked, conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    exact, recall = [], []
    questions = [question for c in conversations for question in c.turns]
    for question, text in zip(questions, asked.texts, strict=True):
        known = bool(question.answers)
        exact.append(float(exact_match(text, question.answers)) if known else np.nan)
        recall.append(keyword_recall(text, question.answers, question.task_type) if known else np.nan)
    return np.array(exact), np.array(recall)


@dataclass(frozen=True)
class _Reference:
    prompt: Prompt
    answer: tuple[str, ...]


def _likelihood(loaded: LanguageModel, led: Asked, conversations: Sequence[Conversation], limits: Limits) -> np.ndarray:
    """Mean log-likelihood per token of the likeliest right answer [T], behind the dense model's conversation."""
    questions = [question for c in conversations for question in c.turns]
    values = np.full(len(questions), np.nan)
    known = [place for place, question in enumerate(questions) if question.answers]
    if known:
        references = [_Reference(led.prompts[place], questions[place].answers) for place in known]
        encoded = encode_items(
            loaded, references, limits.max_tokens, batch_size=limits.batch_size, positions=limits.positions
        )
        values[known] = answer_scores(loaded, encoded).log_likelihood
    return values


def _divergence(
    dense: LanguageModel, sliced: LanguageModel, led: Asked, limits: Limits, progress: Steps
) -> tuple[np.ndarray, np.ndarray]:
    """KL and agreement per turn [T], at the last prompt token and along the dense model's own answer."""
    collected = DivergenceAccumulator()
    done = 0
    for batch in batches_of(dense, led.items, batch_size=limits.batch_size):
        owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu()]
        scored = (batch.input_ids, batch.attention_mask, batch.score_mask)
        collected.add(dense.scored_logits(*scored), sliced.scored_logits(*scored), owner)
        done += len(batch.rows)
        progress(done, len(led.items))
    result = collected.result()
    return np.array(result.kl_per_prompt), np.array(result.agreement_per_prompt)
