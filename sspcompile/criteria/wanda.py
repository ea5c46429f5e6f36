"""Wanda: weight magnitude times input norm.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, section 3: the
importance of weight W_ij is |W_ij| * |X_j|_2, X_j being input channel j over all tokens.
Adapted: summed over a head's columns of o_proj, the only place where the heads' channels are inputs of a weight. The
paper compares weights within an output row; here whole heads are compared, also between layers.
"""

from __future__ import annotations

import numpy as np
import torch

from sspcompile.criteria.channels import head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel


def wanda(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    return unit_sums(loaded, Units.of(loaded.geometry, given.granularity), moments(loaded, given).root_mean_square)


def unit_sums(loaded: LoadedModel, units: Units, norms: np.ndarray) -> np.ndarray:
    """[L, U], the products summed over each unit's columns; `norms` [L, heads * D] are those of the input channels."""
    columns = [output_weight(loaded, layer).abs().sum(0, dtype=torch.float64) for layer in range(units.layers)]
    return units.sum(head_sums(loaded, torch.stack(columns).cpu().numpy() * norms))
