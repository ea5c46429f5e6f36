"""LLM-Pruner: first-order Taylor importance of the coupled weights of a head.

Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv 2305.11627, section 3.2, element-wise
importance to first order, |dL/dw * w|, summed over a group of coupled weights.
Adapted: the coupled weights are a head's rows of q_proj, columns of o_proj and its equal share of the group's rows of
k_proj and v_proj. L is the next-token loss on the prompts with the dense model's own greedy continuation as the labels,
mean over each prompt's scored positions and over prompts, so no labels are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.criteria.magnitude import PROJECTIONS, attention_sums
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.errors import InputError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.logits import decoder_output, log_probabilities, mean_by_sequence
from sspcompile.model.modules import projection_place


def llm_pruner(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]. Raises InputError for a model whose weights are not all where it is computed."""
    if any(parameter.is_meta for parameter in loaded.model.parameters()):
        raise InputError(
            "llm-pruner needs gradients of weights, and some of this model's lie outside of the device.",
            hint="Give more --memory, or another --criterion.",
        )
    units = Units.of(loaded.geometry, given.granularity)
    places = {name: projection_place(loaded.geometry, name) for name in PROJECTIONS}
    weights = {
        (layer, module): getattr(decoder.self_attn, module).weight
        for layer, decoder in enumerate(loaded.layers)
        for module in dict(places.values())
    }
    gradients = dict(zip(weights, _gradients(loaded, given, list(weights.values())), strict=True))

    def product(layer: int, name: str, weight: Tensor) -> Tensor:
        module, rows = places[name]
        return (gradients[layer, module][rows] * weight).abs()

    scores = [attention_sums(loaded, layer, partial(product, layer)) for layer in range(units.layers)]
    return units.sum(np.stack(scores))


def _gradients(loaded: LoadedModel, given: CriterionInput, weights: list[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean loss with respect to each weight, summed over batches."""
    total = [torch.zeros_like(weight) for weight in weights]
    for index, batch in enumerate(given.batches):
        with _trainable(weights), torch.enable_grad():
            predicted = log_probabilities(loaded, decoder_output(loaded, batch), batch.score_mask)
            # The greedy continuation is the most likely token at every scored position, by its definition.
            loss = mean_by_sequence(-predicted.max(-1).values, batch.score_mask).sum() / given.prompts
            for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                sum_ += gradient
        given.report(index + 1, len(given.batches))
    return total


@contextlib.contextmanager
def _trainable(weights: list[nn.Parameter]) -> Iterator[None]:
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
