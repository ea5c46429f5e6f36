"""A member's refitted matrix as a low-rank difference from the prefix of the dense one, and what it adds up to.

`refitted` is the only place where prefix and difference become the member's matrix: what is judged, proven and cut out
comes from it. Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sspcompile.errors import ArtifactError

# What the factors are called behind the name of their module: `weight + lora_B diag(scale) lora_A`, as in LoRA (Hu et
# al. 2021, arXiv 2106.09685), whose layout adapters are known by. Nothing here was trained.
WEIGHT, OUTPUTS, INPUTS, SCALES = ".weight", ".lora_B.weight", ".lora_A.weight", ".lora_scale"
PARTS = (OUTPUTS, INPUTS, SCALES)
# The largest number that a factor holds.
HIGHEST = 127
# Of float64 at a time.
BAND_BYTES = 16 << 20


@dataclass(frozen=True)
class LowRank:
    """A difference `outputs` [out, rank] times diag(`scales`) times `inputs` [rank, in]: int8, and a scale [rank] for
    each direction in fp32, since products of two small steps are below what 16 bits hold.

    A byte is enough: what a direction misses by it is a ten-thousandth of its energy, and the next direction, which
    there is room for instead, is worth more.
    """

    outputs: np.ndarray
    inputs: np.ndarray
    scales: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.inputs)

    @property
    def flops(self) -> int:
        """Of a token that passes both factors: two for every element, as a matrix's own are counted."""
        return 2 * (self.outputs.size + self.inputs.size)


# A matrix in full [out, in] in raw words, or as a difference.
Stored = np.ndarray | LowRank


def low_rank(outputs: np.ndarray, inputs: np.ndarray) -> LowRank:
    """The difference `outputs` [out, rank] times `inputs` [rank, in], float64."""
    of_outputs, of_inputs = _step(outputs.T), _step(inputs)
    whole = _whole(outputs / of_outputs), _whole(inputs / of_inputs[:, None])
    return LowRank(*whole, (of_outputs * of_inputs).astype(np.float32))


def _step(rows: np.ndarray) -> np.ndarray:
    """Of each row [rank, n] what one of its whole numbers stands for; of a row of zeros anything."""
    highest = np.abs(rows).max(1, initial=0.0)
    return np.where(highest > 0, highest, 1.0) / HIGHEST


def _whole(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), -HIGHEST, HIGHEST).astype(np.int8)


def rank_bytes(rows: int, columns: int) -> int:
    """Of one direction of a matrix [rows, columns]: a byte for each number, and its scale."""
    return rows + columns + 4


def difference(stored: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """Its factors [out, rank] and [rank, in] in float64, scales in the second one."""
    return stored.outputs.astype(np.float64), stored.inputs * stored.scales.astype(np.float64)[:, None]


def refitted(prefix: np.ndarray, stored: Stored, dtype: str) -> np.ndarray:
    """The member's matrix [out, in] as raw words of a safetensors `dtype`; `prefix` are those of the dense one.

    Sums are made in float64 and rounded once.
    """
    if not isinstance(stored, LowRank):
        return stored
    outputs, inputs = difference(stored)
    rows = max(1, BAND_BYTES // (8 * max(1, prefix.shape[1])))
    bands = [
        words_of(numbers(prefix[at : at + rows], dtype) + outputs[at : at + rows] @ inputs, dtype)
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
    """Names and contents of a member's file, from the names of matrices in the model: raw words of matrices in full,
    factors in int8 and scales in fp32.
    """
    found: dict[str, np.ndarray] = {}
    for name, one in stored.items():
        if isinstance(one, LowRank):
            module = name.removesuffix(WEIGHT)
            found |= {module + OUTPUTS: one.outputs, module + INPUTS: one.inputs, module + SCALES: one.scales}
        else:
            found[name] = one
    return found


def from_file(names: Mapping[str, object], read: Callable[[str], np.ndarray]) -> dict[str, Stored]:
    """The way back: `read` gives the raw words of one of the `names`. Raises ArtifactError for half a difference."""
    found: dict[str, Stored] = {}
    for name in names:
        part = next((part for part in PARTS if name.endswith(part)), None)
        if part is None:
            found[name] = read(name)
            continue
        module = name.removesuffix(part)
        missing = next((module + other for other in PARTS if module + other not in names), None)
        if missing is not None:
            raise ArtifactError(f"{name} has no {missing} beside it.", hint="Build the artifact again.")
        if part == OUTPUTS:
            outputs, inputs = (read(module + one).view(np.int8) for one in (OUTPUTS, INPUTS))
            found[module + WEIGHT] = LowRank(outputs, inputs, read(module + SCALES).view(np.float32))
    return found
