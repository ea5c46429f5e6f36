"""DaSS: dependency-aware semi-structured sparsity.

Guo et al., arXiv 2405.01943, its pruning metric: in a gated MLP, row i of gate and up, intermediate channel i and
column i of down depend on each other, so weights of the input projections are scored with the norm of the intermediate
channel that they produce, |W_ij| * (|Y_i|_2)^0.5, and those of the output projection as in Wanda, |W_ji| * |Y_i|_2.
Adapted from MLPs to attention heads: the intermediate channels are the inputs of o_proj. Channel c of head h is
produced by row c of the value projection of h's group (weighted by attention, which takes the place of the gate), and
consumed by column c of o_proj. A head's score is the sum over both; a value row that serves several heads is shared out
evenly. Query and key rows produce no channel of their own and are left out.
"""

from __future__ import annotations

import numpy as np
import torch

from sspcompile.criteria.channels import head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import projection_weight

POWER = 0.5


def dass(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    g = loaded.geometry
    units = Units.of(g, given.granularity)
    produced, consumed = [], []
    for layer in range(units.layers):
        rows = projection_weight(loaded, layer, "v_proj").abs().sum(1, dtype=torch.float64)
        by_group = rows.view(g.kv_heads, 1, g.head_dim) / g.group_size
        produced.append(by_group.expand(-1, g.group_size, -1).flatten().cpu())  # [heads * D]
        consumed.append(output_weight(loaded, layer).abs().sum(0, dtype=torch.float64).cpu())
    norms = moments(loaded, given).root_mean_square
    channels = torch.stack(produced).numpy() * norms**POWER + torch.stack(consumed).numpy() * norms
    return units.sum(head_sums(loaded, channels))
