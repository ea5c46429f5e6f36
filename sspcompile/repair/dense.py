"""The dense model on the texts of a fit, one layer at a time: what repairs aim at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import LayerCall, input_of, passed_over, recorded_calls
from sspcompile.model.modules import layer_output, residual_norm
from sspcompile.model.streaming import in_memory
from sspcompile.model.text import Batch

# Of the weight of all positions. On the embedded model, unweighted positions (about a tenth) leave up to 15 points of
# exact match behind, and a share near 1 forgets how the prompt is read.
SCORED_SHARE = 0.5


class Dense:
    """The dense model on the texts, one layer at a time; all hidden states are [B, T, d] per batch.

    `hidden` is what the current layer puts out (before the first: what enters it), `after` its residual stream after
    attention. `real` marks what is not padding, `weights` holds what those positions count.
    """

    def __init__(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        self.loaded = loaded
        self.hidden: list[Tensor] = []
        self.after: list[Tensor] = []
        self.real = [batch.attention_mask.bool() for batch in batches]
        self.weights = [w[real] for w, real in zip(position_weights(batches), self.real, strict=True)]
        self._calls: list[list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = []
        for batch in batches:
            recorded = calls_of(loaded, batch)
            self.hidden.append(recorded[0].hidden)
            self._calls.append([(recorded[index].rest, recorded[index].options) for index in range(len(recorded))])

    def run(self, index: int, number: int, hidden: Tensor) -> Tensor:
        """Another hidden state through a layer, called as the model calls it for this batch."""
        rest, options = self._calls[number][index]
        return layer_output(self.loaded.layers[index](hidden, *rest, **options))

    def advance(self, index: int) -> None:
        """Take the hidden states through the next layer."""
        self.after = []
        for number, hidden in enumerate(self.hidden):
            with input_of(residual_norm(self.loaded.layers[index]), "residual norm") as seen:
                self.hidden[number] = self.run(index, number, hidden)
            self.after.append(seen[0])

    def beyond(self, index: int, more: int) -> list[Tensor]:
        """What so many `more` layers behind the current one put out."""
        found = list(self.hidden)
        for behind in range(index + 1, index + 1 + more):
            with in_memory(self.loaded.layers[behind]):
                found = [self.run(behind, number, hidden) for number, hidden in enumerate(found)]
        return found

    def missing(self, reached: Tensor, target: Tensor) -> Tensor:
        """What a layer still has to put out, [B, T, d] in fp32, for the residual stream to get from what is `reached`
        to a `target`.
        """
        return (target.to(reached.device).float() - reached.float()) / self.loaded.geometry.residual_multiplier


def calls_of(loaded: LoadedModel, batch: Batch) -> Mapping[int, LayerCall]:
    """How the model calls its layers for a batch."""
    with passed_over(loaded.layers), recorded_calls(loaded.layers) as recorded:
        loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return recorded


def position_weights(batches: Sequence[Batch]) -> list[Tensor]:
    """Weight of every position, [B, T] per batch: scored ones have at least SCORED_SHARE of all, and are as heavy as
    other real ones where that is more.
    """
    scored = sum(int(batch.score_mask.sum()) for batch in batches)
    other = sum(int(batch.attention_mask.sum()) for batch in batches) - scored
    # Half of the weight for the eight tokens that open a passage would be a fit to its first tokens.
    ratio = max(1.0, SCORED_SHARE / (1 - SCORED_SHARE) * other / scored)
    return [torch.where(batch.score_mask, ratio, 1.0) for batch in batches]
