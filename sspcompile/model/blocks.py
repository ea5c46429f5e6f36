"""What a matrix is worth once it is rounded, as ONNX Runtime rounds it: a repair that knows can mend it.

In a row of a weight [out, in] each block of neighbouring inputs has a scale s and a whole zero point z; a number w
becomes (q - z) s with q = clip(round(w / s + z), 0, 2^bits - 1). Blocks span their numbers and 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Inputs that share a scale unless a user says otherwise.
BLOCK = 32


@dataclass(frozen=True)
class Rounding:
    """To so many `bits`, in blocks of so many inputs. Whoever only names one waits for no torch."""

    bits: int
    block: int = BLOCK

    def of(self, weight: Tensor) -> Tensor:
        """The numbers [..., in] that the rounded rows stand for, in fp32."""
        import torch
        from torch.nn.functional import pad

        numbers = weight.detach().float()
        inputs = numbers.shape[-1]
        blocks = pad(numbers, (0, -inputs % self.block)).unflatten(-1, (-1, self.block))
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        highest = 2**self.bits - 1
        scale = (high - low) / highest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a block of zeros
        zero = (-low / scale).round().clamp(0, highest)
        codes = (blocks / scale + zero).round().clamp(0, highest)
        return ((codes - zero) * scale).flatten(-2)[..., :inputs]

    def of_columns(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The same of a matrix [out, in] of which the `kept` columns, bool [in], will be written; zeros elsewhere."""
        full = weight.new_zeros(weight.shape).float()
        kept = kept.to(weight.device)
        if kept.any():
            full[:, kept] = self.of(weight[:, kept])
        return full


ROUNDINGS: Mapping[str, Rounding] = {"int8": Rounding(8), "int4": Rounding(4)}
