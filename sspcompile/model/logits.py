"""The model's next-token distribution at the positions where it decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import Batch

# Logits that exist at a time: 32 MiB in fp32, and a few tensors of that size beside them.
LOGITS_AT_ONCE = 2**23


def rows_at_once(loaded: LoadedModel) -> int:
    """Of how many positions the logits may exist at a time."""
    return max(1, LOGITS_AT_ONCE // loaded.vocab)


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


@torch.inference_mode()
def scored_states(loaded: LoadedModel, batch: Batch) -> Tensor:
    """The decoder's normalised output at the scored positions, [S, d]: what lm_head makes logits of.

    To keep it instead of logits is smaller by the factor V / d, for one more multiplication with lm_head.
    """
    hidden = decoder_output(loaded, batch)
    return hidden[batch.score_mask.to(hidden.device)]


def log_probabilities(loaded: LoadedModel, hidden: Tensor, score_mask: Tensor) -> Tensor:
    """Log-probabilities of the next token at the scored positions, [S, V] fp32."""
    return torch.log_softmax(scored_logits(loaded, hidden, score_mask), dim=-1)


def mean_by_sequence(values: Tensor, score_mask: Tensor) -> Tensor:
    """Mean over each sequence's scored positions: [S] and the mask [B, T] -> [B], in the dtype of `values`."""
    score_mask = score_mask.to(values.device)
    owner = score_mask.nonzero()[:, 0]
    total = torch.zeros(len(score_mask), dtype=values.dtype, device=values.device).index_add_(0, owner, values)
    return total / score_mask.sum(-1)
