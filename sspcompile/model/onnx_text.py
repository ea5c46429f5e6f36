"""An ONNX export as a text model: the same questions that are put to a model in transformers, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sspcompile.checkpoint.settings import read_generation
from sspcompile.errors import ArtifactError, InputError
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import Chooser, Rows
from sspcompile.model.loading import tokenizer_of_export
from sspcompile.model.onnx_session import SETTINGS, OnnxModel, read_settings
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.model.vocabulary import ends_of
from sspcompile.request.options import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OnnxText:
    """What `decoder.TextModel` offers to those who ask questions, computed by ONNX Runtime."""

    session: OnnxModel
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    rendering: Rendering = PLAIN

    @property
    def device(self) -> torch.device:
        """Where answers are: tensors go in and come out on the processor, whatever the provider."""
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
        logits = self.session.logits(input_ids.cpu().numpy(), attention_mask.cpu().numpy())
        return torch.from_numpy(logits[score_mask.cpu().numpy()])

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

        Raises InputError where T + `new_tokens` exceed the positions that the graph was made for: the caller decides
        which of the two to shorten.
        """
        width = input_ids.shape[1]
        if self.positions is not None and width + new_tokens > self.positions:
            raise InputError(
                f"{width} tokens and {new_tokens} new ones exceed the {self.positions} that the export reads.",
                hint="Ask for fewer, or export with a longer --context-length.",
            )
        rows = Rows(len(input_ids), self.ends)
        if not new_tokens:
            return rows.tails
        logits, cache = self.session.prefill(
            input_ids.cpu().numpy(), attention_mask.cpu().numpy(), capacity=width + new_tokens
        )
        scores = logits[:, -1]
        for number in range(new_tokens):
            tokens = scores.argmax(-1) if choose is None else choose(torch.from_numpy(scores)).numpy()
            on_tokens(tokens.tolist())
            if rows.ended(tokens.tolist()) or number + 1 == new_tokens:
                break
            scores = self.session.step(np.asarray(tokens), cache)
        return rows.tails


def _session(folder: Path, placement: Placement, size: float | None) -> OnnxModel:
    device = "cpu" if placement.device == AUTO else placement.device
    return OnnxModel.open(folder, size=size, provider=device, threads=placement.threads)


def load_onnx(
    folder: Path, *, size: float | None = None, placement: Placement = ON_CPU, rendering: Rendering = PLAIN
) -> OnnxText:
    """Open an export with its tokenizer, as `OnnxModel.open` does; `auto` is the CPU.

    Raises ArtifactError or CheckpointError for a damaged one, and what `OnnxModel.open` raises.
    """
    read_generation(folder)
    session, settings = _session(folder, placement, size), read_settings(folder)
    if settings is None:
        raise ArtifactError(f"{folder} lacks {SETTINGS}.", hint="Export it again.")
    tokenizer = tokenizer_of_export(folder)
    return OnnxText(session, tokenizer, ends_of(sorted(settings.ends), tokenizer, session.vocab), rendering)
