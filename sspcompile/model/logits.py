"""The model's next-token distribution at the positions where it decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import Batch


def decoder_output(loaded: LoadedModel, batch: Batch) -> Tensor:
    """The decoder's normalised output, [B, T, d]."""
    return loaded.model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state


def scored_logits(loaded: LoadedModel, hidden: Tensor, score_mask: Tensor) -> Tensor:
    """Logits at the scored positions only, [S, V] fp32, from the decoder's normalised output [B, T, d].

    They are on the device that token ids are on, wherever the last layers of a spread model lie.
    """
    return loaded.logits_of(hidden[score_mask.to(hidden.device)]).to(loaded.device)


def log_probabilities(loaded: LoadedModel, hidden: Tensor, score_mask: Tensor) -> Tensor:
    """Log-probabilities of the next token at the scored positions, [S, V] fp32."""
    return torch.log_softmax(scored_logits(loaded, hidden, score_mask), dim=-1)


def mean_by_sequence(values: Tensor, score_mask: Tensor) -> Tensor:
    """Mean over each sequence's scored positions: [S] and the mask [B, T] -> [B], in the dtype of `values`."""
    score_mask = score_mask.to(values.device)
    owner = score_mask.nonzero()[:, 0]
    total = torch.zeros(len(score_mask), dtype=values.dtype, device=values.device).index_add_(0, owner, values)
    return total / score_mask.sum(-1)
