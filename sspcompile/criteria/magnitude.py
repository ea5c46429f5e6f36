"""Weight magnitude: the Frobenius norm of what would be cut.

The oldest criterion (Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626,
section 3), here over a head's rows of q_proj and columns of o_proj and its equal share of the group's rows of k_proj
and v_proj; of a group, over all of its rows and columns. Biases are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import projection_weight
from sspcompile.model.stored import double_device

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ElementValue = Callable[[str, Tensor], Tensor]


def magnitude(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    squares = [
        attention_sums(loaded, layer, lambda _name, weight: weight.double().square()) for layer in range(units.layers)
    ]
    return np.sqrt(units.sum(np.stack(squares)))


def attention_sums(loaded: LoadedModel, layer: int, of: ElementValue) -> np.ndarray:
    """Sum of `of(name, weight)` over each query head's part of q, k, v and o, [H] float64.

    `of` maps a projection's name and weight to a tensor of the weight's shape. A head's part of k and v is an equal
    share of its group's, so that the heads of a group add up to the group.
    """
    g = loaded.geometry
    total = torch.zeros(g.heads, dtype=torch.float64, device=double_device(loaded.device))
    with torch.no_grad():
        for name in PROJECTIONS:
            values = of(name, projection_weight(loaded, layer, name))
            lines = values.sum(0 if name == "o_proj" else 1, dtype=torch.float64)  # one per head coordinate
            per_head = lines.view(-1, g.head_dim).sum(-1)  # [H], or [G] for k and v
            share = g.heads // len(per_head)
            total += per_head.repeat_interleave(share) / share
    return total.cpu().numpy()
