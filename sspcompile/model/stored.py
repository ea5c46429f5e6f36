"""From raw words of a weight file to numbers that are computed with."""

from __future__ import annotations

from collections.abc import Mapping

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
