"""LLM-Pruner: first-order Taylor importance of the coupled weights of a head.

Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv 2305.11627, section 3.2, element-wise
importance to first order, |dL/dw * w|, summed over a group of coupled weights.
Adapted: the coupled weights are a head's rows of q_proj, columns of o_proj and its equal share of the group's rows of
k_proj and v_proj. L is the next-token loss on the prompts with the dense model's own greedy continuation as the labels,
mean over each prompt's scored positions and over prompts, so no labels are needed.

For heads and channels together (`llm_pruner_structures`) the loss is the paper's own: that of every next token of the
texts as they stand. A channel's coupled weights are its rows of gate_proj and up_proj and its column of down_proj.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.criteria.magnitude import PROJECTIONS, attention_sums, channel_sums
from sspcompile.criteria.units import CriterionInput, Structures, Units
from sspcompile.errors import InputError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.gradients import Cotangent, state_gradients
from sspcompile.model.logits import decoder_output, log_probabilities, mean_by_sequence
from sspcompile.model.modules import projection_place
from sspcompile.model.recompute import recomputed
from sspcompile.model.text import Batch


def llm_pruner(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]. Raises InputError for a model whose weights are not all where it is computed."""
    if not has_gradients(loaded):
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
        return (gradients[layer, module][rows].to(weight.device) * weight).abs()

    scores = [attention_sums(loaded, layer, partial(product, layer)) for layer in range(units.layers)]
    return units.sum(np.stack(scores))


def has_gradients(loaded: LoadedModel) -> bool:
    """Whether all weights are where the model is computed: those that lie elsewhere have no gradient."""
    return not any(parameter.is_meta for parameter in loaded.model.parameters())


def llm_pruner_structures(loaded: LoadedModel, given: CriterionInput) -> Structures:
    """Sums of |gradient * weight|, in nats per token of the texts.

    One forward pass, a second one layer by layer, and a backward pass with gradients of weights, which are held beside
    the weights. Only for a model that `has_gradients`.
    """
    g = loaded.geometry
    places = {name: projection_place(g, name) for name in PROJECTIONS}
    names = {f"self_attn.{module}" for module, _ in places.values()}
    names |= {linear.name for linear in g.family.mlp} if g.is_dense else set()
    weights = [layer.get_submodule(name).get_parameter("weight") for layer in loaded.layers for name in sorted(names)]

    def product(layer: int, name: str, weight: Tensor) -> Tensor:
        module, rows = places.get(name, (name, slice(None)))
        found = loaded.layers[layer].get_submodule(f"self_attn.{module}" if name in places else name)
        gradient = found.get_parameter("weight").grad
        assert gradient is not None  # noqa: S101 (every one of these weights is trainable inside)
        return (gradient[rows].to(weight.device) * weight).abs()

    layers, tokens = range(g.layers), sum(int(batch.attention_mask[:, 1:].sum()) for batch in given.batches)
    with _trainable(weights):
        _add_gradients(loaded, given)
        heads = np.stack([attention_sums(loaded, layer, partial(product, layer)) for layer in layers]) / tokens
        if not g.is_dense:
            return Structures(heads, None)
        channels = np.stack([channel_sums(loaded, layer, partial(product, layer)) for layer in layers])
        return Structures(heads, channels / tokens)


def _add_gradients(loaded: LoadedModel, given: CriterionInput) -> None:
    """Of the loss summed over all next tokens of the texts, into `grad` of every weight that is trainable.

    A mean would divide what 16 bits can hold before the backward pass, and small gradients would be lost.
    """
    for index, batch in enumerate(given.batches):
        foretold = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        foretold[:, :-1] = batch.attention_mask[:, 1:].bool()  # sequences are padded behind
        with torch.enable_grad(), recomputed(loaded.layers):
            hidden = decoder_output(loaded, batch)
            states = hidden[foretold.to(hidden.device)]
            towards = state_gradients(loaded, states, _missing(batch, foretold))
            torch.autograd.backward(states, towards)
        given.report(index + 1, len(given.batches))


def _missing(batch: Batch, foretold: Tensor) -> Cotangent:
    """Prediction minus next token: the gradient of the summed loss with respect to logits, part of them after part."""
    left = batch.input_ids.roll(-1, 1)[foretold]

    def cotangent(logits: Tensor) -> Tensor:
        nonlocal left
        following, left = left[: len(logits)].to(logits.device), left[len(logits) :]
        p = torch.softmax(logits, dim=-1)
        return p.scatter_add_(1, following[:, None], torch.full_like(p[:, :1], -1.0))

    return cotangent


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
            weight.grad = None
