"""Where the graph's weights lie: in the source's own files, linked or copied whole, or streamed once into others.

Weights keep the orientation of the checkpoint ([out, in]); the graph multiplies with the transpose. Whatever need not
change is therefore not touched.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.checkpoint.source import INDEX_NAME, file_order
from sspcompile.checkpoint.tensors import LM_HEAD
from sspcompile.checkpoint.transfer import hard_link, write_all
from sspcompile.errors import CheckpointError
from sspcompile.export.onnx.placed import COSINES, SINES, Placed, Quantised, placed

ROTARY_FILE, DATA_FILE = "rotary.bin", "model.onnx.data"
# Kernels read whole cache lines.
ALIGNMENT = 64
BAND_BYTES = 8 << 20
NUMPY = {"F32": np.float32, "F16": np.float16}
FLOATS = ("F32", "F16", "BF16")


def share_weights(tensors: Mapping[str, TensorInfo], source: Path, folder: Path, *, link: bool) -> dict[str, Placed]:
    """Copy the weight files of `source` whole, or with `link` give them a second name, and point into the copies."""
    for file in file_order(source):
        if not (link and hard_link(file, folder / file.name)):
            shutil.copyfile(file, folder / file.name)
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, folder / INDEX_NAME)
    return {name: placed(info) for name, info in tensors.items()}


class DataFile:
    """A file of weights that is written once, from front to back. Use as a context manager."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        self._path, self._progress = path, progress

    def __enter__(self) -> DataFile:
        self._stream = self._path.open("wb", buffering=0)
        self._end = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, pieces: Iterable[np.ndarray], dtype: str, shape: tuple[int, ...]) -> Placed:
        """Write one tensor, given in pieces along its first axis."""
        gap = -self._end % ALIGNMENT
        write_all(self._stream.fileno(), bytes(gap))
        start = self._end = self._end + gap
        for piece in pieces:
            write_all(self._stream.fileno(), np.ascontiguousarray(piece).data.cast("B"))
            self._end += piece.nbytes
            self._progress(piece.nbytes)
        return Placed(self._path.name, dtype, shape, start, self._end - start)


def convert(tensors: Mapping[str, TensorInfo], data: DataFile, dtype: str) -> dict[str, Placed]:
    """Write every tensor as `dtype` ("F32", "F16"), a band of rows at a time.

    Raises CheckpointError for a value that the dtype cannot hold.
    """
    return {name: data.append(_bands(info, name, dtype), dtype, info.shape) for name, info in tensors.items()}


def transpose(tensors: Mapping[str, TensorInfo], data: DataFile, dtype: str) -> dict[str, Placed]:
    """Write matrices [out, in] as `dtype`, [in, out], one in memory at a time. Raises what `convert` raises."""
    return {
        name: replace(data.append([as_float(info, name, dtype).T], dtype, info.shape[::-1]), turned=True)
        for name, info in tensors.items()
    }


def quantise(
    matrices: Mapping[str, Mapping[str, TensorInfo]],
    data: DataFile,
    dtype: str,
    *,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> dict[str, Quantised]:
    """Write matrices [out, in] in blocks of `block_size` along their input, a band of rows in memory at a time.

    Each consists of one or several tensors of the checkpoint, one below the other. The rounding is ONNX Runtime's own
    (asymmetric, so that every block has a zero point); scales have the dtype of the activations.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
        QuantFormat,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size,
        is_symmetric=False,
        accuracy_level=accuracy_level,
        bits=bits,
        quant_format=QuantFormat.QOperator,
    )
    rounding = DefaultWeightOnlyQuantizer(config)
    found = {}
    for name, parts in matrices.items():
        rows = sum(info.shape[0] for info in parts.values())
        columns = next(iter(parts.values())).shape[1]
        blocks = -(-columns // block_size)
        beside: list[tuple[np.ndarray, np.ndarray]] = []

        def packed(parts: Mapping[str, TensorInfo] = parts, beside: list = beside) -> Iterator[np.ndarray]:
            for band in (band for part, info in parts.items() for band in _bands(info, part, dtype)):
                # The quantiser wants [in, out], and floats of the dtype that the scales shall have.
                codes, scales, zeros = rounding.qbits_block_quant(np.ascontiguousarray(band.T))
                beside.append((scales, zeros))
                yield codes

        codes = data.append(packed(), "U8", (rows, blocks, block_size * bits // 8))
        scales, zeros = (np.concatenate(pieces) for pieces in zip(*beside, strict=True))
        stored = (codes, data.append([scales], dtype, scales.shape), data.append([zeros], "U8", zeros.shape))
        found[name] = Quantised(rows, columns, bits, block_size, accuracy_level, stored)
    return found


def data_bytes(
    floats: Iterable[tuple[int, ...]], matrices: Iterable[tuple[int, int]], dtype: str, *, bits: int, block_size: int
) -> int:
    """Size of a file to which `convert` wrote tensors of the shapes `floats`, and `quantise` matrices [out, in]."""
    width = np.dtype(NUMPY[dtype]).itemsize
    sizes = [math.prod(shape) * width for shape in floats]
    for rows, columns in matrices:
        blocks = -(-columns // block_size)
        # Codes, scales and zero points, of which a row takes whole bytes.
        sizes += [rows * blocks * block_size * bits // 8, rows * blocks * width, rows * -(-blocks * bits // 8)]
    end = 0
    for size in sizes:
        end += -end % ALIGNMENT + size
    return end


def _bands(info: TensorInfo, name: str, dtype: str) -> Iterator[np.ndarray]:
    return (as_float(info.band(*rows), name, dtype) for rows in info.bands(BAND_BYTES))


def as_float(info: TensorInfo, name: str, dtype: str) -> np.ndarray:
    """A tensor as numpy floats of `dtype`. Raises CheckpointError for a dtype or a value that cannot be converted."""
    words = read_words(info)
    if info.dtype == "BF16":
        values = (words.astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in NUMPY:
        values = words.view(NUMPY[info.dtype])
    else:
        raise CheckpointError(f"{name} is stored as {info.dtype}.", hint=f"Accepted: {', '.join(FLOATS)}.")
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values.astype(NUMPY[dtype]))
    if not np.isfinite(converted).all():
        what = "infinite or undefined values" if not np.isfinite(values).all() else "values beyond 65504"
        raise CheckpointError(f"{name} has {what}, which {dtype} cannot hold.", hint="Use --precision fp32.")
    return converted


def used_tensors(tensors: Mapping[str, TensorInfo], *, tied: bool) -> dict[str, TensorInfo]:
    """What the graph reads, in file order. It has no use for a second copy of tied embeddings or stored frequencies."""
    unused = {LM_HEAD} if tied else set()
    return {
        name: info for name, info in tensors.items() if name not in unused and not name.endswith("rotary_emb.inv_freq")
    }


def write_rotary(folder: Path, frequencies: np.ndarray, scale: float, positions: int, dtype: str) -> dict[str, Placed]:
    """Cosines and sines [positions, head_dim / 2] of every angle, computed in fp32, a band of positions at a time.

    All layers share them. Together they take positions * head_dim * 4 bytes in "F32" and half of that in "F16".
    """
    turned = frequencies.astype(np.float32)[None, :]
    step = max(1, BAND_BYTES // turned.nbytes)

    def rows(function: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        for start in range(0, positions, step):
            angles = np.arange(start, min(positions, start + step), dtype=np.float32)[:, None] * turned
            yield (function(angles) * np.float32(scale)).astype(NUMPY[dtype])

    shape = (positions, turned.shape[1])
    with DataFile(folder / ROTARY_FILE, lambda _: None) as data:
        return {name: data.append(rows(f), dtype, shape) for name, f in ((COSINES, np.cos), (SINES, np.sin))}
