"""Weight magnitude: the Frobenius norm of what would be cut.

The oldest criterion (Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626,
section 3), here over a head's rows of q_proj and columns of o_proj and its equal share of the group's rows of k_proj
and v_proj; of a group, over all of its rows and columns. Biases are left out. Of a channel of an MLP it is the norm of
its rows of gate_proj and up_proj and its column of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.units import CriterionInput, Structures, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import projection_weight
from sspcompile.model.stored import double_device
from sspcompile.model.weights import weight_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ElementValue = Callable[[str, Tensor], Tensor]


def magnitude(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    return np.sqrt(units.sum(np.stack([attention_sums(loaded, layer, _squares) for layer in range(units.layers)])))


def magnitude_structures(loaded: LoadedModel) -> Structures:
    """Norms of all weights that a head, or a channel, would take with it; no text is read."""
    layers = range(loaded.geometry.layers)
    heads = np.sqrt([attention_sums(loaded, layer, _squares) for layer in layers])
    if not loaded.geometry.is_dense:
        return Structures(heads, None)
    return Structures(heads, np.sqrt([channel_sums(loaded, layer, _squares) for layer in layers]))


def _squares(_name: str, weight: Tensor) -> Tensor:
    return weight.double().square()


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
            total += (per_head.repeat_interleave(share) / share).to(total.device)
    return total.cpu().numpy()


def channel_sums(loaded: LoadedModel, layer: int, of: ElementValue) -> np.ndarray:
    """Sum of `of(name, weight)` over each channel's rows of the matrices that an MLP reads with, and its column of the
    one that it writes with, [intermediate] float64. `name` is the family table's, as `mlp.down_proj`.
    """
    g = loaded.geometry
    total = torch.zeros(g.intermediate, dtype=torch.float64, device=double_device(loaded.device))
    with torch.no_grad():
        for linear in g.family.mlp:
            weight = weight_of(loaded.layers[layer].get_submodule(linear.name))
            values = of(linear.name, weight.to(double_device(weight.device)))
            lines = values.sum(0 if linear.columns == "intermediate" else 1, dtype=torch.float64)
            # Where they are fused, the rows of gate stand above those of up.
            total += lines.view(-1, g.intermediate).sum(0).to(total.device)
    return total.cpu().numpy()
