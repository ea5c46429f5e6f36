"""A GGUF export as a text model: the same questions that are put to a model in transformers, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sspcompile.checkpoint.settings import read_generation
from sspcompile.errors import InputError
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import Chooser, Rows
from sspcompile.model.llama_session import MODEL, LlamaModel
from sspcompile.model.loading import tokenizer_of_export
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.model.vocabulary import ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LlamaText:
    """What `decoder.TextModel` offers to those who ask questions, computed by llama.cpp, one text after the other."""

    session: LlamaModel
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    rendering: Rendering = PLAIN

    @property
    def device(self) -> torch.device:
        """Where answers are."""
        return torch.device("cpu")

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self.session.vocab

    @property
    def positions(self) -> int | None:
        """The longest text that it can read, in tokens."""
        return self.session.positions

    def scored_logits(self, input_ids: Tensor, attention_mask: Tensor, score_mask: Tensor) -> Tensor:
        """Logits [S, V] in fp32 at the positions that `score_mask` (bool [B, T]) marks, row after row."""
        found = []
        for ids, seen, scored in zip(input_ids, attention_mask.bool(), score_mask.bool(), strict=True):
            row = ids[seen].tolist()
            self.session.start(row, len(row))
            found.append(self.session.scores()[scored[seen].cpu().numpy()])
        return torch.from_numpy(np.concatenate(found))

    def continuations(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        new_tokens: int,
        *,
        choose: Chooser | None = None,
        on_tokens: Callable[[list[int]], None] = lambda _: None,
    ) -> list[list[int]]:
        """At most `new_tokens` tokens behind every row of [B, T], which is padded on the left; end tokens included.

        `on_tokens` hears every step of one row after the other. Raises InputError where T + `new_tokens` exceed the
        positions of the model: the caller decides which of the two to shorten.
        """
        width = input_ids.shape[1]
        if self.positions is not None and width + new_tokens > self.positions:
            raise InputError(
                f"{width} tokens and {new_tokens} new ones exceed the {self.positions} that the model reads.",
                hint="Ask for fewer.",
            )
        return [
            self._continued(ids[seen].tolist(), new_tokens, choose, on_tokens)
            for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)
        ]

    def _continued(
        self, ids: list[int], new_tokens: int, choose: Chooser | None, on_tokens: Callable[[list[int]], None]
    ) -> list[int]:
        rows = Rows(1, self.ends)
        if not new_tokens:
            return rows.tails[0]
        scores = self.session.start(ids, len(ids) + new_tokens)
        for number in range(new_tokens):
            token = int(scores.argmax()) if choose is None else int(choose(torch.from_numpy(scores)[None])[0])
            on_tokens([token])
            if rows.ended([token]) or number + 1 == new_tokens:
                break
            scores = self.session.read([token])
        return rows.tails[0]


def load_gguf(
    folder: Path, *, placement: Placement = ON_CPU, rendering: Rendering = PLAIN, scoring: bool = False
) -> LlamaText:
    """Open an export with its tokenizer; `scoring` is what `scored_logits` needs.

    Raises ArtifactError or CheckpointError for a damaged one, and InputError without llama.cpp.
    """
    read_generation(folder)
    tokenizer = tokenizer_of_export(folder)
    session = LlamaModel(folder / MODEL, threads=placement.threads, scoring=scoring)
    ends = (read_generation(folder) or {}).get("eos_token_id")
    return LlamaText(session, tokenizer, ends_of(ends, tokenizer, session.vocab), rendering)
