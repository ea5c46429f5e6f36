"""RIA: relative importance and activations.

Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models, ICLR 2024,
section 3: RIA_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * (|X_j|_2)^a with a = 0.5, the two sums being
over the weights of the same input channel and of the same output.
Adapted: summed over a head's columns of o_proj.
"""

from __future__ import annotations

import numpy as np
import torch

from sspcompile.criteria.channels import head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel

POWER = 0.5


def ria(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    shares = []
    for layer in range(units.layers):
        weight = output_weight(loaded, layer).abs().double()
        # A channel or output without any weight has no share of anything: 0 / tiny = 0.
        tiny = torch.finfo(torch.float64).tiny
        of_channel = weight / weight.sum(0, keepdim=True).clamp(min=tiny)
        of_output = weight / weight.sum(1, keepdim=True).clamp(min=tiny)
        shares.append((of_channel + of_output).sum(0).cpu())
    norms = moments(loaded, given).root_mean_square
    return units.sum(head_sums(loaded, torch.stack(shares).numpy() * norms**POWER))
