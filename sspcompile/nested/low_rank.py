"""A member's refitted matrix as a low-rank difference from the prefix of the dense one, and what it adds up to.

`refitted` is the only place where prefix and difference become the member's matrix: what is judged, proven and cut out
comes from it. Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sspcompile.errors import ArtifactError

# What the two factors are called behind the name of their module: `weight + lora_B lora_A`, as in LoRA (Hu et al. 2021,
# arXiv 2106.09685), whose layout adapters are known by. Nothing here was trained.
WEIGHT, OUTPUTS, INPUTS = ".weight", ".lora_B.weight", ".lora_A.weight"
# Of float64 at a time.
BAND_BYTES = 16 << 20


@dataclass(frozen=True)
class LowRank:
    """A difference `outputs` [out, rank] times `inputs` [rank, in], raw words of the dtype of the dense matrix."""

    outputs: np.ndarray
    inputs: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.inputs)

    @property
    def flops(self) -> int:
        """Of a token that passes both factors: two for every element, as a matrix's own are counted."""
        return 2 * (self.outputs.size + self.inputs.size)


# A matrix in full [out, in], or as a difference.
Stored = np.ndarray | LowRank


def refitted(prefix: np.ndarray, stored: Stored, dtype: str) -> np.ndarray:
    """The member's matrix [out, in] as raw words of a safetensors `dtype`; `prefix` are those of the dense one.

    Sums are made in float64 and rounded once.
    """
    if not isinstance(stored, LowRank):
        return stored
    inputs = numbers(stored.inputs, dtype)
    rows = max(1, BAND_BYTES // (8 * max(1, prefix.shape[1])))
    bands = [
        words_of(
            numbers(prefix[at : at + rows], dtype) + numbers(stored.outputs[at : at + rows], dtype) @ inputs, dtype
        )
        for at in range(0, len(prefix), rows)
    ]
    return np.concatenate(bands)


def numbers(words: np.ndarray, dtype: str) -> np.ndarray:
    """Raw words of a floating-point dtype as float64, which holds all of them exactly."""
    words = np.ascontiguousarray(words)
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return words.view(_FLOATS[dtype]).astype(np.float64)


def words_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 as raw words of a dtype, rounded to the nearest, ties to even."""
    if dtype == "BF16":
        words = values.astype(np.float32).view(np.uint32)
        return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    found = values.astype(_FLOATS[dtype])
    return found.view(f"u{found.itemsize}")


_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def file_tensors(stored: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """Names and raw words in a member's file, from the names of matrices in the model."""
    found: dict[str, np.ndarray] = {}
    for name, one in stored.items():
        if isinstance(one, LowRank):
            module = name.removesuffix(WEIGHT)
            found |= {module + OUTPUTS: one.outputs, module + INPUTS: one.inputs}
        else:
            found[name] = one
    return found


def from_file(names: Mapping[str, object], read: Callable[[str], np.ndarray]) -> dict[str, Stored]:
    """The way back: `read` gives the raw words of one of the `names`. Raises ArtifactError for half a difference."""
    found: dict[str, Stored] = {}
    for name in names:
        if name.endswith(INPUTS):
            continue
        if not name.endswith(OUTPUTS):
            found[name] = read(name)
            continue
        module = name.removesuffix(OUTPUTS)
        if module + INPUTS not in names:
            raise ArtifactError(f"{name} has no {module + INPUTS} beside it.", hint="Build the artifact again.")
        found[module + WEIGHT] = LowRank(read(name), read(module + INPUTS))
    return found
