"""Tensors of the graph that lie in files beside it, and what the graph calls those that no checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import TensorProto

from sspcompile.checkpoint.headers import TensorInfo

ELEMENT = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "U8": TensorProto.UINT8}
COSINES, SINES = "rotary.cos", "rotary.sin"


@dataclass(frozen=True)
class Placed:
    """A tensor in a file beside the graph: `offset` in bytes. Several may be views of the same bytes.

    `turned`: a matrix that is stored [in, out], so that the first inputs lie together.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    turned: bool = False

    def first(self, count: int) -> Placed:
        """The first of its rows, in the same place."""
        rows, *rest = self.shape
        return replace(self, shape=(count, *rest), nbytes=self.nbytes // rows * count)

    def reference(self, name: str) -> TensorProto:
        """The initializer that points there."""
        tensor = TensorProto(name=name, data_type=ELEMENT[self.dtype], dims=self.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.file), ("offset", self.offset), ("length", self.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@dataclass(frozen=True)
class Quantised:
    """A weight [rows, columns] in blocks along its columns, as MatMulNBits reads it: packed, scales and zero points."""

    rows: int
    columns: int
    bits: int
    block_size: int
    accuracy_level: int
    parts: tuple[Placed, ...]

    def as_table(self) -> tuple[Placed, ...]:
        """The same bytes as GatherBlockQuantized reads them: codes [rows, bytes of a row]."""
        codes, *beside = self.parts
        return replace(codes, shape=(self.rows, codes.nbytes // self.rows)), *beside


def placed(info: TensorInfo) -> Placed:
    """A tensor of a checkpoint where it lies."""
    return Placed(info.file.name, info.dtype, info.shape, info.offset, info.nbytes)
