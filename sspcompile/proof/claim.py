"""What is to be proven of a written folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sspcompile.checkpoint.source import Checkpoint, tensor_table
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.stored import read_tensor
from sspcompile.repair.repair import DOWN, Repair
from sspcompile.slicing.mask import HeadMask

WEIGHT, BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"


@dataclass(frozen=True)
class Claim:
    """`written` holds what `mask` leaves of `checkpoint` and computes what the masked model computes.

    `refitted`: the tensors that a repair computed, by name, as the raw words that were to be written, or None where
    only their places are known; both the masked model and the written one have them. `custom_code`: the folder's own
    class loads it.
    """

    checkpoint: Checkpoint
    mask: HeadMask
    written: Path
    custom_code: bool
    refitted: Mapping[str, np.ndarray | None] = field(default_factory=dict)

    @property
    def silent(self) -> set[str]:
        """The tensors that are zeros: o_proj of a layer that keeps no head."""
        return {layer_prefix(layer) + WEIGHT for layer, kept in enumerate(self.mask.kept) if not kept}

    @property
    def geometry(self) -> Geometry:
        """Of the dense model."""
        return self.checkpoint.geometry


def any_refitted(g: Geometry, *, down: bool) -> dict[str, None]:
    """Every tensor that a repair can compute, and with `down` that of the MLP: for records that do not list them."""
    parts = (WEIGHT, *([BIAS] if g.o_bias else []), *([DOWN] if down else []))
    return {layer_prefix(layer) + part: None for layer in range(g.layers) for part in parts}


def written_repair(claim: Claim) -> Repair:
    """The refitted tensors as the folder holds them; o_proj in the dense shape, zero in removed columns."""
    g, written = claim.geometry, tensor_table(claim.written)
    weights, biases, down = {}, {}, {}
    for layer, kept in enumerate(claim.mask.kept):
        names = {part: layer_prefix(layer) + part for part in (WEIGHT, BIAS, DOWN)}
        found = {part: read_tensor(written[name]) for part, name in names.items() if name in claim.refitted}
        if WEIGHT in found:
            full = torch.zeros(g.hidden, g.heads, g.head_dim, dtype=found[WEIGHT].dtype)
            full[:, list(kept)] = found[WEIGHT].view(g.hidden, len(kept), g.head_dim)
            weights[layer] = full.view(g.hidden, g.heads * g.head_dim)
        if BIAS in found:
            biases[layer] = found[BIAS]
        if DOWN in found:
            down[layer] = found[DOWN]
    return Repair(weights, biases, down)
