"""From raw words of a weight file to numbers that are computed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.errors import CheckpointError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of a tensor as it is stored, in memory at a time while it becomes one that is computed with.
BAND_BYTES = 16 << 20
# Devices that compute nothing in float64: Apple's GPUs.
WITHOUT_DOUBLES = frozenset({"mps"})


def stored_dtype(dtype: str) -> torch.dtype:
    """torch's name of a safetensors dtype. Raises CheckpointError for one that weights are not computed with."""
    if dtype not in STORED_DTYPES:
        raise CheckpointError(f"Weights are stored as {dtype}.", hint=f"Accepted: {', '.join(STORED_DTYPES)}.")
    return STORED_DTYPES[dtype]


def as_tensor(words: np.ndarray, dtype: str) -> Tensor:
    """Raw words of a safetensors dtype as a tensor of that dtype, in the shape of `words`."""
    return torch.from_numpy(words.view(np.uint8)).view(stored_dtype(dtype)).view(words.shape)


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor of a weight file, in its stored dtype."""
    return as_tensor(read_words(info), info.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter of `shape` that is read whenever it is needed, in `dtype`, on `device`.

    `parts`: what it is made of, one behind the other in the order of storage; more than one for stacked experts.
    """

    parts: tuple[TensorInfo, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """The numbers, in memory of their own. Raises CheckpointError when a file is shorter than it promised."""
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flat, start = found.view(-1), 0
        for numbers in self._pieces():
            flat[start : start + len(numbers)].copy_(numbers)
            start += len(numbers)
        return found

    @property
    def finite(self) -> bool:
        """Whether every number is one; reads them all."""
        return all(bool(torch.isfinite(numbers).all()) for numbers in self._pieces())

    def _pieces(self) -> Iterator[Tensor]:
        """The numbers as they are stored, in their order, one band of a part at a time."""
        for part in self.parts:
            for rows in part.bands(BAND_BYTES):
                yield read_tensor(part.band(*rows) if part.shape else part).view(-1)


def double_device(device: torch.device) -> torch.device:
    """Where float64 of `device` is computed with: there, or on the CPU beside one of WITHOUT_DOUBLES."""
    return torch.device("cpu") if device.type in WITHOUT_DOUBLES else device


def in_double(tensor: Tensor) -> Tensor:
    """A tensor in float64, where it lies or where there is float64."""
    return tensor.to(double_device(tensor.device)).double()
