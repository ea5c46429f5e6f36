"""An ONNX export as a text model: the same questions that are put to a model in transformers, on the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sspcompile.errors import ArtifactError, CheckpointError
from sspcompile.model.decoder import Chooser, Rows, ends_of
from sspcompile.model.loading import open_tokenizer, readable
from sspcompile.model.onnx_session import GRAPH, SETTINGS, OnnxModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OnnxText:
    """What `decoder.TextModel` offers to those who ask questions, computed by ONNX Runtime."""

    session: OnnxModel
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    @property
    def device(self) -> torch.device:
        """Where answers are: tensors go in and come out on the processor, whatever the provider."""
        return torch.device("cpu")

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self.session.vocab

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
        """At most `new_tokens` tokens behind every row of [B, T], which is padded on the left; end tokens included."""
        rows = Rows(len(input_ids), self.ends)
        if not new_tokens:
            return rows.tails
        logits, cache = self.session.prefill(
            input_ids.cpu().numpy(), attention_mask.cpu().numpy(), capacity=input_ids.shape[1] + new_tokens
        )
        scores = logits[:, -1]
        for number in range(new_tokens):
            tokens = scores.argmax(-1) if choose is None else choose(torch.from_numpy(scores)).numpy()
            on_tokens(tokens.tolist())
            if rows.ended(tokens.tolist()) or number + 1 == new_tokens:
                break
            scores = self.session.step(np.asarray(tokens), cache)
        return rows.tails


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds an ONNX export."""
    return (folder / GRAPH).is_file()


def load_onnx(folder: Path, *, provider: str = "cpu", spin: bool = True) -> OnnxText:
    """Open an export with its tokenizer, as `OnnxModel.open` does.

    Raises ArtifactError for a damaged one, and what `OnnxModel.open` raises.
    """
    session = OnnxModel.open(folder, provider=provider, spin=spin)
    try:
        model = json.loads((folder / SETTINGS).read_text("utf-8"))["model"]
        with readable(folder):
            tokenizer = open_tokenizer(folder)
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise ArtifactError(f"{folder} lacks {SETTINGS} or a tokenizer.", hint="Export it again.") from error
    return OnnxText(session, tokenizer, ends_of(model.get("eos_token_id"), tokenizer))
