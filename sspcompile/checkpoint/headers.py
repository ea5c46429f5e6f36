"""The tensor table of one safetensors file, and its values without a framework's tensors in between.

Values are read as raw words (uint8, uint16, uint32 or uint64 of the dtype's width), so that every dtype passes
through bit for bit. Each read is a `pread` into a fresh buffer: a memory map would count as resident memory and would
turn a truncated file into a bus error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sspcompile.checkpoint.transfer import Extent, read_all
from sspcompile.errors import CheckpointError, UnsupportedModelError

WORD_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
FLOATS = ("F16", "BF16", "F32", "F64")
WORD_DTYPE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# The format's own limit: the reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` in bytes from the start of the file, `shape` in elements."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def word_bytes(self) -> int:
        return WORD_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.word_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.word_bytes

    @property
    def extent(self) -> Extent:
        return Extent(self.file, self.offset, self.nbytes)

    def rows(self, start: int, stop: int) -> Extent:
        """Where rows start..stop of the first axis lie."""
        return self.band(start, stop).extent

    def band(self, start: int, stop: int) -> TensorInfo:
        """Rows start..stop of the first axis as a tensor of their own."""
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * self.row_bytes)

    def bands(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows, in bands of at most `nbytes` or of one row; a number by itself is one row."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, nbytes // max(1, self.row_bytes))
        return ((start, min(rows, start + step)) for start in range(0, rows, step))

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """The elements from `first` on, counted in the order of storage, as a tensor of their own."""
        return replace(self, shape=shape, offset=self.offset + first * self.word_bytes)


def read_words(info: TensorInfo) -> np.ndarray:
    """One tensor as raw words, in its shape. Raises CheckpointError when the file is shorter than it promised."""
    words = np.empty(info.shape, dtype=WORD_DTYPE[info.word_bytes])
    with info.file.open("rb", buffering=0) as stream:
        fill(stream.fileno(), words, info.file, info.offset)
    return words


def fill(source: int, words: np.ndarray, file: Path, offset: int) -> None:
    """Read the contiguous array `words` from an open file. Raises CheckpointError when the file ends before."""
    if words.size and not read_all(source, words.data.cast("B"), offset):
        raise CheckpointError(f"{file.name} is shorter than its header says.", hint="Download it again.")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, in the order of its offsets.

    Offsets must cover the data without gaps or overlaps, as the format demands; CheckpointError otherwise.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path.name} is not a safetensors file, or is truncated.", hint="Download it again.")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path.name} has an unreadable header.", hint="Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has an unreadable header.", hint="Download it again.")
    header.pop("__metadata__", None)
    start = 8 + length
    try:
        entries = sorted(
            ((entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()),
            key=lambda item: item[0],
        )
        end = 0
        table: dict[str, TensorInfo] = {}
        for (begin, stop), name, dtype, shape in entries:
            if dtype not in WORD_BYTES:
                raise UnsupportedModelError(
                    f"{path.name} stores {name} as {dtype}.", hint=f"Accepted: {', '.join(WORD_BYTES)}."
                )
            info = TensorInfo(path, dtype, shape, start + begin)
            if any(type(n) is not int or n < 0 for n in (*shape, begin, stop)):
                raise TypeError(name)
            if begin != end or stop - begin != info.nbytes:
                raise CheckpointError(f"{path.name} has wrong offsets at {name}.", hint="Download it again.")
            table[name], end = info, stop
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} has a malformed header.", hint="Download it again.") from error
    if start + end != size:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header promises {start + end}.", hint="Download it again."
        )
    return table


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of a safetensors dtype name."""
    return WORD_BYTES[dtype]
