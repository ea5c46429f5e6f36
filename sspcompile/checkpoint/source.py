"""Reading a safetensors folder by headers first and by slices after, without a framework's tensors in between.

Values are read as raw words (uint8, uint16, uint32 or uint64 of the dtype's width), so that every dtype passes
through bit for bit. Each read is a `pread` into a fresh buffer: a memory map would count as resident memory and would
turn a truncated file into a bus error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint.tensors import tensor_shapes
from sspcompile.checkpoint.tied import untied_by_weights
from sspcompile.checkpoint.tokenizers import named_class_counts
from sspcompile.checkpoint.transfer import Extent, read_all
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families import Geometry, geometry_of

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
DTYPE_OF_CONFIG = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
# The format's own limit: the reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
        return Extent(self.file, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)


class Checkpoint:
    """One model folder: configuration, tensor table, companion files. Opening it reads headers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        self._stated = geometry_of(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes, from the configuration; where the weights untie the head, they have the last word."""
        stated = self._stated
        if stated.family.hosts and not stated.family.tokenizer:
            stated = replace(stated, named_tokenizer=named_class_counts(self.path, self.config))
        return untied_by_weights(stated, self._table) if stated.tied and self.has_weights else stated

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> place, in file order. Raises CheckpointError when files contradict index or configuration."""
        _check_against(self._table, self.geometry, self.path)
        return self._table

    @cached_property
    def _table(self) -> Mapping[str, TensorInfo]:
        refuse_other_weights(self.path, self.config)
        return tensor_table(self.path)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights, readable or not; `tensors` says what is wrong with them."""
        files = (self.path / SINGLE_NAME, self.path / INDEX_NAME)
        return any(file.is_file() for file in files) or _has_pickles(self.path)

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of every tensor: from the headers, or from the configuration without weights."""
        if self.has_weights:
            return {name: (info.shape, info.dtype) for name, info in self.tensors.items()}
        dtype = DTYPE_OF_CONFIG.get(self.geometry.dtype, "F32")
        return {name: (shape, dtype) for name, shape in tensor_shapes(self.geometry).items()}

    def read(self, name: str) -> np.ndarray:
        """The whole tensor as raw words, in its shape."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.shape[0]) if info.shape else self._words(info, 0, 1).reshape(())

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis as raw words, [stop - start, ...]."""
        info = self.tensors[name]
        row = math.prod(info.shape[1:])
        return self._words(info, start * row, (stop - start) * row).reshape(stop - start, *info.shape[1:])

    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """The tensor's bytes in pieces of at most `chunk_bytes`."""
        info = self.tensors[name]
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            left = info.nbytes
            while left:
                piece = stream.read(min(chunk_bytes, left))
                if not piece:
                    raise CheckpointError(f"{info.file.name} ends inside {name}.", hint="Download it again.")
                left -= len(piece)
                yield piece

    def _words(self, info: TensorInfo, first: int, count: int) -> np.ndarray:
        words = np.empty(count, dtype=WORD_DTYPE[info.word_bytes])
        with info.file.open("rb", buffering=0) as stream:
            fill(stream.fileno(), words, info.file, info.offset + first * info.word_bytes)
        return words


def read_words(info: TensorInfo) -> np.ndarray:
    """One tensor as raw words, in its shape. Raises CheckpointError when the file is shorter than it promised."""
    words = np.empty(info.shape, dtype=WORD_DTYPE[info.word_bytes])
    with info.file.open("rb", buffering=0) as stream:
        fill(stream.fileno(), words, info.file, info.offset)
    return words


def fill(source: int, words: np.ndarray, file: Path, offset: int) -> None:
    """Read the contiguous array `words` from an open file. Raises CheckpointError when the file ends before."""
    if words.size and not read_all(source, memoryview(words).cast("B"), offset):
        raise CheckpointError(f"{file.name} is shorter than its header says.", hint="Download it again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}.", hint="--model takes a Hugging Face model folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", hint="Download it again.")
    return value


def refuse_other_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError when the configuration names weights that transformers would read instead."""
    read = SINGLE_NAME if (folder / SINGLE_NAME).is_file() else INDEX_NAME
    named = config.get("transformers_weights")
    if named not in (None, read):
        raise UnsupportedModelError(
            f"config.json names its weights in transformers_weights: {named!r:.60}.",
            hint=f"Call them {SINGLE_NAME}, or {INDEX_NAME} with its shards, and remove the key.",
        )


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob("pytorch_model*.bin"))


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> the tensor names that the index promises in it (None without an index)."""
    # With both, transformers reads the single file; so do we, or the model cut would not be the model measured.
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map.", hint="Download it again.")
        promised: dict[str, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{INDEX_NAME} points to {file!r}.", hint="Shards must lie in the model folder itself."
                )
            names = promised.setdefault(file, set())
            if names is not None:
                names.add(tensor)
        return promised
    if _has_pickles(folder):
        raise CheckpointError(
            f"{folder} holds pickled .bin weights, which are never opened.",
            hint="Save it as safetensors first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).",
        )
    raise CheckpointError(
        f"{folder} holds no weights.", hint=f"Expected {SINGLE_NAME}, or {INDEX_NAME} with its shards."
    )


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor of a folder, whatever model it holds. Raises CheckpointError."""
    table: dict[str, TensorInfo] = {}
    for file, promised in sorted(_weight_files(folder).items()):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the shard {file}.", hint="Download the missing shard.")
        found = read_header(path)
        if promised is not None and (absent := promised - set(found)):
            raise CheckpointError(
                f"{file} lacks {min(absent)}, which {INDEX_NAME} promises.", hint="Download it again."
            )
        if double := set(found) & set(table):
            raise CheckpointError(f"{min(double)} stands in two shards.", hint="Download the checkpoint again.")
        table |= found
    return table


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, in the order of its offsets.

    Offsets must cover the data without gaps or overlaps, as the format demands; CheckpointError otherwise.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path.name} is no safetensors file, or is truncated.", hint="Download it again.")
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


def _check_against(table: Mapping[str, TensorInfo], geometry: Geometry, folder: Path) -> None:
    wanted = tensor_shapes(geometry)
    for name, shape in wanted.items():
        if name not in table:
            raise CheckpointError(
                f"{folder} lacks the tensor {name}, which its config.json demands.", hint="Download it again."
            )
        if table[name].dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{folder} stores {name} as {table[name].dtype}.", hint=f"Accepted: {', '.join(FLOATS)}."
            )
        if table[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(table[name].shape)}; config.json asks for {list(shape)}.",
                hint="config.json and weights must be of the same model.",
            )
    # Tied checkpoints sometimes carry a redundant lm_head; it passes through unchanged.
    spare = {name for name in table if name not in wanted and name != "lm_head.weight"}
    spare = {name for name in spare if not name.endswith("rotary_emb.inv_freq")}
    if spare:
        raise UnsupportedModelError(
            f"{folder} holds {min(spare)}, which {geometry.family.architecture} does not have.",
            hint="Quantised, adapted or extended checkpoints must be merged into plain weights first.",
        )


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of a safetensors dtype name."""
    return WORD_BYTES[dtype]


def file_order(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted by name."""
    return [folder / name for name in sorted(_weight_files(folder))]


def sync_folder(folder: Path) -> None:
    """Flush a directory entry to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
