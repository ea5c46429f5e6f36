"""What a matrix is worth once it is rounded, as a runtime rounds it: a repair that knows can mend it.

In a row of a weight [out, in] each block of neighbouring inputs has a scale of its own.

*ONNX Runtime* has a zero point beside the scale s, a whole number z; a number w becomes (q - z) s with
q = clip(round(w / s + z), 0, 2^bits - 1). Blocks span their numbers and 0, and rows are filled up to whole blocks.

*GGUF* has the scale alone, which is stored in fp16 and divides in fp32 (`quantize_row_q8_0_ref` and
`quantize_row_q4_0_ref` of llama.cpp's ggml-quants.c). A matrix whose rows are not whole blocks is stored in fp16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Inputs that share a scale: always in GGUF, and in ONNX Runtime unless a user says otherwise.
BLOCK = 32


class Rounding(ABC):
    """How the matrices of a model are rounded, in exports of `form`. Whoever only names one waits for no torch."""

    form: ClassVar[Literal["onnx", "gguf"]]

    @abstractmethod
    def of(self, weight: Tensor) -> Tensor:
        """The numbers [..., in] that the rounded rows stand for, in fp32."""

    @abstractmethod
    def of_embeddings(self, rows: Tensor, *, tied: bool) -> Tensor:
        """Rows [..., d] of the embeddings as they are looked up; `tied`: their table is the head's too."""

    def of_columns(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The same of a matrix [out, in] of which the `kept` columns, bool [in], will be written; zeros elsewhere."""
        full = weight.new_zeros(weight.shape).float()
        kept = kept.to(weight.device)
        if kept.any():
            full[:, kept] = self.of(weight[:, kept])
        return full


@dataclass(frozen=True)
class OnnxRounding(Rounding):
    """To so many `bits`, in blocks of so many inputs."""

    form = "onnx"
    bits: int
    block: int = BLOCK

    def of(self, weight: Tensor) -> Tensor:
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

    def of_embeddings(self, rows: Tensor, *, tied: bool) -> Tensor:
        """They are looked up in the rounded head where it is their table and its rows are whole blocks."""
        return self.of(rows) if tied and rows.shape[-1] % self.block == 0 else rows


class GgufRounding(Rounding):
    """A scale per block. Embeddings and head are rounded as `table` rounds."""

    form = "gguf"

    @property
    @abstractmethod
    def table(self) -> GgufRounding: ...

    @abstractmethod
    def scaled(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Of blocks [..., BLOCK] in fp32: the scale of each, [..., 1], and its whole numbers."""

    def of(self, weight: Tensor) -> Tensor:
        import torch

        numbers = weight.detach().float()
        if numbers.shape[-1] % BLOCK:
            return numbers.half().float()
        scale, codes = self.scaled(numbers.unflatten(-1, (-1, BLOCK)))
        stored = scale.half().float()
        # Whole numbers of a scale so small that its inverse is infinite are undefined; in fp16 it is 0.
        return torch.where(stored == 0, 0.0, stored * codes).flatten(-2)

    def of_embeddings(self, rows: Tensor, *, tied: bool) -> Tensor:
        return self.table.of(rows)


@dataclass(frozen=True)
class Q8Rounding(GgufRounding):
    """Q8_0: the largest magnitude becomes 127; halves go away from zero."""

    @property
    def table(self) -> GgufRounding:
        return self

    def scaled(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        shares = blocks * _inverse(scale)
        size = shares.abs()
        whole = size.floor()
        return scale, shares.sign() * (whole + (2 * (size - whole)).floor())


@dataclass(frozen=True)
class Q4Rounding(GgufRounding):
    """Q4_0: the number of the largest magnitude, the first of several, becomes -8; the highest whole number is 7.

    A table in 4 bits would cost most of all; it has 8.
    """

    @property
    def table(self) -> GgufRounding:
        return Q8Rounding()

    def scaled(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        return scale, (blocks * _inverse(scale) + 8.5).trunc().clamp(max=15) - 8


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a block of zeros."""
    import torch

    return torch.where(scale == 0, 0.0, 1 / scale)


GGUF_ROUNDINGS: Mapping[str, GgufRounding] = {"q8_0": Q8Rounding(), "q4_0": Q4Rounding()}
ROUNDINGS: Mapping[str, Rounding] = {"int8": OnnxRounding(8), "int4": OnnxRounding(4), **GGUF_ROUNDINGS}
