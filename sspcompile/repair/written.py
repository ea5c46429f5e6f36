"""What becomes of a refitted matrix when it is written, where that is not the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sspcompile.model.blocks import Rounding


class Written(Protocol):
    """`key` tells one such from others. `of` gives the numbers that a `weight` [out, in] then stands for, o_proj's or
    `down`_proj's; `kept`, bool [in], are the columns that are written, None for all.
    """

    @property
    def key(self) -> object: ...

    def of(self, layer: int, weight: Tensor, *, down: bool, kept: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class RoundedMatrices:
    """Matrices that are rounded when they are written."""

    rounding: Rounding

    @property
    def key(self) -> object:
        return str(self.rounding)

    def of(self, layer: int, weight: Tensor, *, down: bool, kept: Tensor | None) -> Tensor:
        return self.rounding.of(weight) if kept is None else self.rounding.of_columns(weight, kept)
