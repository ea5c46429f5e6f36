"""The numbers of a GGUF: which type each tensor gets, and floats as its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sspcompile.errors import CheckpointError, InputError
from sspcompile.model.blocks import BLOCK

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

NATIVE: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16}
FLOAT_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Kind:
    """A type that `--type` names. `file_type`: its number in llama.cpp (llama_ftype), which is what a file says of
    itself and what its quantiser takes.

    `here`: the type of matrices that `gguf` can write itself, `embedding` that of the table; None where only
    llama.cpp's own quantiser can.
    """

    name: str
    file_type: int
    here: str | None = None
    embedding: str | None = None

    @property
    def rounded(self) -> bool:
        """Whether rounding is the point, and its cost is reported rather than bounded."""
        return self.name not in FLOAT_TYPES


TYPES: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("f32", 0, "F32", "F32"),
        Kind("f16", 1, "F16", "F16"),
        Kind("bf16", 32, "BF16", "BF16"),
        Kind("q8_0", 7, "Q8_0", "Q8_0"),
        # A table in 4 bits costs most of all; llama.cpp gives it 6 bits, which gguf cannot write.
        Kind("q4_0", 2, "Q4_0", "Q8_0"),
        Kind("q6_k", 18),
        Kind("q5_k_m", 17),
        Kind("q4_k_m", 15),
        Kind("q4_k_s", 14),
        Kind("q3_k_m", 12),
    )
}
OF_DTYPE: Mapping[str, str] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def kind_of(name: str | None, dtypes: set[str]) -> Kind:
    """The type that is asked for; by default the one that the matrices are stored in, so that bytes are copied.

    Raises InputError for an unknown name, and where nothing is asked for and the matrices differ.
    """
    if name is None:
        if len(dtypes) != 1:
            raise InputError(
                f"The model is stored in {' and '.join(sorted(dtypes))}.", hint="Choose one with --type, f32 say."
            )
        return TYPES[OF_DTYPE[next(iter(dtypes))]]
    if name.lower() not in TYPES:
        raise InputError(f"There is no GGUF type {name!r:.60}.", hint=f"Accepted: {', '.join(TYPES)}.")
    return TYPES[name.lower()]


def stored_type(wanted: str, shape: tuple[int, ...], *, exact: bool) -> str:
    """The type of one tensor: vectors are F32 always, as llama.cpp wants them, and so are matrices with `exact`.

    Rows that are not whole blocks fall back to F16.
    """
    if len(shape) < 2 or (exact and wanted in ("F16", "BF16")):
        return "F32"
    return "F16" if wanted.startswith("Q") and shape[-1] % BLOCK else wanted


def as_floats(words: np.ndarray, dtype: str) -> np.ndarray:
    """Raw words of a dtype of FLOATS as fp32, exactly."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.view(NATIVE[dtype]).astype(np.float32)


def encode(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """fp32 rows [rows, columns] as the bytes of a type. Raises CheckpointError for values that it cannot hold."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} has infinite or undefined values.", hint="No runtime can use them.")
    if kind in NATIVE:
        with np.errstate(over="ignore"):
            converted = values.astype(NATIVE[kind])
        if not np.isfinite(converted).all():
            raise CheckpointError(f"{name} has values beyond 65504, which F16 cannot hold.", hint="Use --type f32.")
        return converted
    from gguf.quants import quantize

    return quantize(values, type_of(kind))


def type_of(kind: str) -> GGMLQuantizationType:
    """The type as `gguf` calls it."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this shape takes."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[type_of(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size
