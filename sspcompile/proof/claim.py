"""What is to be proven of a written folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.source import Checkpoint, tensor_table
from sspcompile.checkpoint.tensors import down_names, layer_of, moved, of_attention
from sspcompile.errors import ParityError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.stored import read_tensor
from sspcompile.proof.parity import REPORT
from sspcompile.repair.repair import Repair, bias_name, channels_of, down_name
from sspcompile.slicing.mask import HeadMask

WEIGHT, BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"


@dataclass(frozen=True)
class Claim:
    """`written` holds what `mask` leaves of `checkpoint` and computes what the masked model computes.

    `refitted`: the tensors that a repair computed, by their names in the source, as the raw words that were to be
    written, or None where only their places are known; both the masked model and the written one have them.
    `custom_code`: the folder's own class loads it.
    """

    checkpoint: Checkpoint
    mask: HeadMask
    written: Path
    custom_code: bool
    refitted: Mapping[str, np.ndarray | None] = field(default_factory=dict)

    def goes(self, name: str) -> bool:
        """Whether the mask removes a tensor of the source whole: with its layer, or with the attention of that."""
        layer = layer_of(name)
        if layer is None:
            return False
        return layer in self.mask.removed or (layer in self.mask.silent and of_attention(self.geometry, name))

    @property
    def there(self) -> dict[str, TensorInfo]:
        """Every tensor of the written folder, under the name that it has in the source: layers count from 0 again
        where some were removed. Raises ParityError for a layer, or an attention, that should not be there.
        """
        numbers, found = dict(enumerate(self.mask.staying)), {}
        for name, info in tensor_table(self.written).items():
            layer = layer_of(name)
            if (layer is not None and layer not in numbers) or self.goes(source := moved(name, numbers)):
                raise ParityError(f"The written model has {name}, which the mask removes.", hint=REPORT)
            found[source] = info
        return found

    @property
    def geometry(self) -> Geometry:
        """Of the dense model."""
        return self.checkpoint.geometry


def any_refitted(g: Geometry, *, down: bool) -> dict[str, None]:
    """Every tensor that a repair can compute, and with `down` that of the MLP: for records that do not list them."""
    parts = (WEIGHT, *([BIAS] if g.o_bias else []))
    names = [layer_prefix(layer) + part for layer in range(g.layers) for part in parts]
    return dict.fromkeys(names + ([down_name(g, layer) for layer in range(g.layers)] if down else []))


def written_repair(claim: Claim) -> Repair:
    """The refitted tensors as the folder holds them, in their dense shapes, zero in removed columns."""
    g, written, kept = claim.geometry, claim.there, claim.mask.units
    weights, biases, down, down_biases, experts = {}, {}, {}, {}, {}

    def found(name: str) -> torch.Tensor | None:
        return read_tensor(written[name]) if name in claim.refitted else None

    def of_experts(layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        channels = channels_of(kept, g, layer)
        for number, name in enumerate(down_names(g, layer) if layer in g.sparse else ()):
            if (weight := found(name)) is not None:
                yield number, widened(weight, channels[number])

    for layer in claim.mask.staying:
        attends = kept.attends(layer)
        if attends and (weight := found(layer_prefix(layer) + WEIGHT)) is not None:
            weights[layer] = widened(weight, np.repeat(kept.heads[layer], g.head_dim))
        if attends and (bias := found(layer_prefix(layer) + BIAS)) is not None:
            biases[layer] = bias
        if (weight := found(down_name(g, layer))) is not None:
            down[layer] = weight if kept.channels is None else widened(weight, kept.channels[layer])
        if (bias := found(bias_name(g, layer))) is not None:
            down_biases[layer] = bias
        if own := dict(of_experts(layer)):
            experts[layer] = own
    return Repair(weights, biases, down, down_biases, experts)


def widened(weight: torch.Tensor, columns: np.ndarray) -> torch.Tensor:
    """A matrix [rows, kept] with its columns where `columns` (bool [all]) is true, [rows, all], and zeros elsewhere."""
    full = torch.zeros(len(weight), len(columns), dtype=weight.dtype)
    full[:, torch.from_numpy(columns)] = weight
    return full
