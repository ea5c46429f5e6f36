"""What held-out texts lose with a trimmed vocabulary: the same words, in the tokens of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sspcompile.intervals import Estimate, mean_estimate
from sspcompile.model.decoder import LanguageModel
from sspcompile.model.text import MAX_TOKENS, Sentence, batches_of, with_references
from sspcompile.request.prompts import Passage, Prompt, answered, asked_of, passage
from sspcompile.trimming.tokens import TokenLoss

# A passage is cut to so many tokens of the dense model, and read whole by both.
PASSAGE_READ = 128


@dataclass(frozen=True)
class TextCost:
    """Of one text in one model's tokens: `nats` in all over the `scored` ones, and `tokens` with the prompt's."""

    nats: float
    scored: int
    tokens: int


@dataclass(frozen=True)
class Judged:
    """What texts lose. `perplexity` of their answers, times the dense model's, per token of the dense model; `length`
    in tokens, times that of the dense model. None without a text that has an answer."""

    texts: int
    tokens: TokenLoss
    perplexity: Estimate | None
    length: Estimate | None


def with_answers(model: LanguageModel, prompts: Sequence[Prompt], items: Sequence[Sentence]) -> list[Prompt]:
    """The prompts with what stands behind them as text, of a length that both models read whole.

    `items` are what the dense model made of them: its own continuation where there is no answer. A prompt behind which
    nothing stands is left out.
    """
    found: list[Prompt] = []
    for prompt, item in zip(prompts, items, strict=True):
        if isinstance(prompt, Passage):
            found.append(passage(_text_of(model, item.ids[:PASSAGE_READ])))
        elif tail := _text_of(model, item.ids[item.prompt :]):
            found.append(answered(asked_of(prompt), tail))
    return found


def _text_of(model: LanguageModel, ids: Sequence[int]) -> str:
    """Without what no prompt may hold: control characters, which models write, and half a character at the end."""
    text = str(model.tokenizer.decode(list(ids), skip_special_tokens=True))
    kept = "".join(one for one in text if one.isprintable() or one in "\n\t")
    return kept.replace("\N{REPLACEMENT CHARACTER}", "").strip()


@torch.inference_mode()
def costs_of_texts(model: LanguageModel, prompts: Sequence[Prompt], max_tokens: int = MAX_TOKENS) -> list[TextCost]:
    """One pass over texts that have their answers. In the order of `prompts`."""
    items = with_references(model, prompts, max_tokens)
    nats = np.zeros(len(items))
    for batch in batches_of(model, items):
        logits = model.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask)
        wanted = batch.input_ids.roll(-1, dims=1)[batch.score_mask]
        lost = cross_entropy(logits, wanted.to(logits.device), reduction="none")
        owner = np.array(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu().numpy()]
        np.add.at(nats, owner, lost.double().cpu().numpy())
    return [TextCost(float(lost), item.scored, len(item.ids)) for lost, item in zip(nats, items, strict=True)]


def judged(tokens: TokenLoss, dense: Sequence[TextCost], trimmed: Sequence[TextCost], *, seed: int) -> Judged:
    """The same texts in both models, text by text."""
    if not dense:
        return Judged(0, tokens, None, None)
    pairs = list(zip(dense, trimmed, strict=True))
    above = mean_estimate([(two.nats - one.nats) / one.scored for one, two in pairs], seed=seed)
    low, high = (None if end is None else float(np.exp(end)) for end in (above.low, above.high))
    perplexity = replace(above, value=float(np.exp(above.value)), low=low, high=high)
    length = mean_estimate([two.tokens / one.tokens for one, two in pairs], seed=seed)
    return Judged(len(pairs), tokens, perplexity, length)
