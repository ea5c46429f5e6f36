"""Moments of the input channels of every o_proj over real tokens, in one forward pass, and sums over a head's channels;
the same of every down_proj, whose input channels are those of the MLP.

Channel h * D + c of a layer's o_proj input is coordinate c of query head h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.criteria.units import CriterionInput
from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.modules import down_proj, o_proj, projection_weight
from sspcompile.model.stored import double_device, in_double
from sspcompile.model.text import Batch
from sspcompile.model.weights import weight_of


@dataclass(frozen=True)
class Moments:
    """Sums over `tokens` real tokens of the channels and of their squares, [L, heads * D] (of an MLP [L, intermediate])
    float64.
    """

    tokens: int
    sums: np.ndarray
    squares: np.ndarray

    @property
    def mean_square(self) -> np.ndarray:
        return self.squares / self.tokens

    @property
    def root_mean_square(self) -> np.ndarray:
        """The l2 norm of a channel over the tokens, divided by the square root of their number.

        That factor is the same for all heads; without it, a domain with longer prompts would count for more.
        """
        return np.sqrt(self.mean_square)

    @property
    def variance(self) -> np.ndarray:
        """Sample variance over tokens; 0 where there is one token only."""
        spread = self.squares - self.sums**2 / self.tokens
        return spread.clip(min=0) / max(1, self.tokens - 1)


def moments(loaded: LoadedModel, given: CriterionInput) -> Moments:
    """Of what enters every o_proj, over all real tokens of the given, prompts and continuations alike."""
    return _moments(loaded, given, [o_proj(layer) for layer in loaded.layers])


def structure_moments(loaded: LoadedModel, given: CriterionInput) -> tuple[Moments, Moments | None]:
    """The same, and of what enters every down_proj (None where layers choose between experts), in one forward pass."""
    g = loaded.geometry
    places = [o_proj(layer) for layer in loaded.layers]
    places += [down_proj(layer) for layer in loaded.layers] if g.is_dense else []
    both, width = _moments(loaded, given, places), g.heads * g.head_dim
    attention, mlp = (
        Moments(both.tokens, both.sums[:, part], both.squares[:, part]) for part in (slice(width), slice(width, None))
    )
    return attention, mlp if g.is_dense else None


def _moments(loaded: LoadedModel, given: CriterionInput, places: Sequence[nn.Module]) -> Moments:
    """Of what enters each of the places, those of a layer side by side; kept by the journal batch by batch."""
    kept = journal.current().rows("moments", loaded, [given.batches, len(places)])
    total: np.ndarray | float = 0.0
    for number, batch in enumerate(given.batches):
        total = total + kept.of(number, partial(_sums, loaded, batch, places))
        given.report(number + 1, len(given.batches))
    sums, squares = np.asarray(total)
    return Moments(sum(int(batch.attention_mask.sum()) for batch in given.batches), sums, squares)


@torch.inference_mode()
def _sums(loaded: LoadedModel, batch: Batch, places: Sequence[nn.Module]) -> np.ndarray:
    """Of what enters each of the places, and of its squares, summed over real tokens: [2, L, all channels of a layer];
    places of one kind stand behind each other, a layer each.
    """
    real = batch.attention_mask.bool()
    found: dict[int, Tensor] = {}

    def read(place: int, x: Tensor) -> None:
        values = in_double(x[real.to(x.device)])  # [tokens, channels]
        found[place] = torch.stack([values.sum(0), values.square().sum(0)]).cpu()

    with reading(places, "o_proj or down_proj", read):
        loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    layers = loaded.geometry.layers
    rows = [torch.cat([found[place] for place in range(layer, len(places), layers)], 1) for layer in range(layers)]
    return torch.stack(rows, 1).numpy()


def down_weight(loaded: LoadedModel, layer: int) -> Tensor:
    """down_proj's weight, [d, intermediate] fp32: column j multiplies channel j of the MLP.

    It is on its layer's device, or on the CPU beside one without float64.
    """
    weight = weight_of(down_proj(loaded.layers[layer]))
    return weight.to(double_device(weight.device)).float()


def output_weight(loaded: LoadedModel, layer: int) -> Tensor:
    """o_proj's weight, [d, heads * D] fp32: column j multiplies input channel j."""
    return projection_weight(loaded, layer, "o_proj").float()


def head_columns(loaded: LoadedModel, layer: int) -> Tensor:
    """o_proj's columns of each query head, [H, d, hd] fp32. The head size is the model's own, never d / H."""
    g = loaded.geometry
    return output_weight(loaded, layer).view(g.hidden, g.heads, g.head_dim).permute(1, 0, 2)


def head_sums(loaded: LoadedModel, channels: np.ndarray) -> np.ndarray:
    """Sum over the channels of each query head: [L, heads * D] -> [L, H]."""
    g = loaded.geometry
    return channels.reshape(g.layers, g.heads, g.head_dim).sum(-1)
