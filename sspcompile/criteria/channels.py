"""Moments of the input channels of every o_proj over real tokens, in one forward pass, and sums over a head's channels.

Channel h * D + c of a layer's o_proj input is coordinate c of query head h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.units import CriterionInput
from sspcompile.model.capture import capture
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import projection_weight


@dataclass(frozen=True)
class Moments:
    """Sums over `tokens` real tokens of the channels and of their squares, [L, heads * D] float64."""

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
    """Over all real tokens of the given, prompts and continuations alike."""
    g = loaded.geometry
    sums = torch.zeros(2, g.layers, g.heads * g.head_dim, dtype=torch.float64)
    tokens = 0
    for index, batch in enumerate(given.batches):
        real = batch.attention_mask.bool()

        def read(layer: int, x: Tensor, real: Tensor = real) -> None:
            values = x[real.to(x.device)].double()  # [tokens, channels]
            sums[0, layer] += values.sum(0).cpu()
            sums[1, layer] += values.square().sum(0).cpu()

        capture(loaded, batch, read)
        tokens += int(real.sum())
        given.report(index + 1, len(given.batches))
    return Moments(tokens, sums[0].numpy(), sums[1].numpy())


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
