"""Wanda: weight magnitude times input norm.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, section 3: the
importance of weight W_ij is |W_ij| * |X_j|_2, X_j being input channel j over all tokens.
Adapted: summed over a head's columns of o_proj, the only place where the heads' channels are inputs of a weight. The
paper compares weights within an output row; here whole heads are compared, also between layers.

Wanda-sp, the structured form that An et al. (arXiv 2312.11983, experiments) compare FLAP with, sums the same product
over a head's columns of o_proj and over a channel's column of down_proj, and removes the same share of every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import Moments, down_weight, head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Structures, Units
from sspcompile.model.decoder import LoadedModel


def wanda(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    return units.sum(head_products(loaded, moments(loaded, given)))


def wanda_structures(loaded: LoadedModel, attention: Moments, mlp: Moments | None) -> Structures:
    """Sums of |weight| * root mean square of its input; the unit is that of what a layer writes, so only scores of one
    kind in one layer are to be compared.
    """
    channels = None if mlp is None else _columns(loaded, mlp, down_weight)
    return Structures(head_products(loaded, attention), channels)


def head_products(loaded: LoadedModel, attention: Moments) -> np.ndarray:
    """|weight| * root mean square of its input, summed over the columns of every query head, [L, H]."""
    return head_sums(loaded, _columns(loaded, attention, output_weight))


def _columns(loaded: LoadedModel, found: Moments, weight: Callable[[LoadedModel, int], Tensor]) -> np.ndarray:
    """[L, channels]: the product summed over the column that each channel is multiplied with."""
    layers = range(loaded.geometry.layers)
    columns = [weight(loaded, layer).abs().sum(0, dtype=torch.float64).cpu() for layer in layers]
    return torch.stack(columns).numpy() * found.root_mean_square
