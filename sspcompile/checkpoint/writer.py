"""Writing safetensors shards as a stream: headers first, since all sizes are known from the plan, then the bytes."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspcompile.checkpoint.headers import WORD_BYTES
from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME
from sspcompile.checkpoint.transfer import Extent, Moved, copy_extent, hard_link, write_all

if TYPE_CHECKING:
    import numpy as np

# transformers refuses a file whose metadata names no framework.
METADATA = {"format": "pt"}

Piece = bytes | memoryview | Extent

# While the kernel moves the bytes of one shard, the processor gathers the columns of another. More writers would only
# add seeks.
WRITERS = 2


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written. `content` yields its bytes in order: extents of other files, or at most a buffer.

    A yielded buffer may be filled again once the next piece is asked for. `unchanged`: the whole tensor as it stands
    in another safetensors file. `shard`: tensors of one name stay together when no shard size is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Callable[[], Iterable[Piece]]
    unchanged: Extent | None = None
    shard: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WORD_BYTES[self.dtype]


def content_of(words: np.ndarray) -> Callable[[], Iterable[Piece]]:
    """Raw words in memory as the content of a tensor."""
    return lambda: [(words if words.flags.c_contiguous else words.copy(order="C")).data.cast("B")]


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_bytes: int | None = None,
    progress: Moved | None = None,
    link_unchanged: bool = False,
) -> None:
    """Write `tensors` as model.safetensors, or as shards with an index when they are more than one.

    Shards follow `OutputTensor.shard`, or the order of `tensors` and the limit `max_shard_bytes`. `progress` receives
    the number of bytes just written, from one thread at a time. WRITERS shards are written side by side, with one
    buffer each in memory. A shard that equals a source file is copied whole, or with `link_unchanged` becomes a second
    name of it. Raises CheckpointError when a source file ends early.
    """
    shards = _split(tensors, max_shard_bytes) if max_shard_bytes is not None else _as_grouped(tensors)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    _write_side_by_side(
        [
            partial(_write_shard, folder / name, shard, link=link_unchanged)
            for name, shard in zip(names, shards, strict=True)
        ],
        progress,
    )
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


class _Stopped(Exception):
    """Another writer failed, or the user interrupted: this one need not go on."""


def _write_side_by_side(writes: Sequence[Callable[[Moved], None]], progress: Moved | None) -> None:
    """Run `writes`, WRITERS at a time. The first error ends all of them at their next piece, and is raised."""
    lock, stopped = threading.Lock(), threading.Event()

    def moved(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        if progress is not None:
            with lock:
                progress(count)

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(write, moved) for write in writes]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:  # an interrupt reaches only this thread; the writers must hear of it
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _split(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _as_grouped(tensors: Sequence[OutputTensor]) -> list[list[OutputTensor]]:
    shards: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        shards.setdefault(tensor.shard, []).append(tensor)
    return list(shards.values()) or [[]]


def _write_shard(path: Path, tensors: Sequence[OutputTensor], moved: Moved, link: bool) -> None:
    source = _same_file(tensors)
    if source is None:
        _write_file(path, tensors, moved)
        return
    data = sum(tensor.nbytes for tensor in tensors)
    if link and hard_link(source, path):
        moved(data)
        return
    size = source.stat().st_size
    with source.open("rb") as opened, path.open("wb", buffering=0) as target:
        copy_extent(opened.fileno(), target.fileno(), Extent(source, 0, size - data))
        copy_extent(opened.fileno(), target.fileno(), Extent(source, size - data, data), moved)


def _same_file(tensors: Sequence[OutputTensor]) -> Path | None:
    """The source file that holds exactly these tensors unchanged, if there is one."""
    extents = [tensor.unchanged for tensor in tensors if tensor.unchanged is not None]
    if not extents or len(extents) != len(tensors) or len({extent.file for extent in extents}) > 1:
        return None
    file = extents[0].file
    # Tensors cover the data of a safetensors file without gaps, so equal sums mean that none is left out.
    data = file.stat().st_size - min(extent.offset for extent in extents)
    return file if data == sum(extent.length for extent in extents) and _starts_after_header(file, extents) else None


def _starts_after_header(file: Path, extents: Sequence[Extent]) -> bool:
    with file.open("rb") as stream:
        return min(extent.offset for extent in extents) == 8 + int.from_bytes(stream.read(8), "little")


def _write_file(path: Path, tensors: Sequence[OutputTensor], moved: Moved) -> None:
    # Descending word size keeps every tensor aligned to its own width, as the reference writer does.
    tensors = sorted(tensors, key=lambda tensor: -WORD_BYTES[tensor.dtype])
    header = _header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], METADATA)
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(path.open("wb", buffering=0)).fileno()
        opened: dict[Path, int] = {}
        write_all(target, header)
        for tensor in tensors:
            written = 0
            for piece in tensor.content():
                if isinstance(piece, Extent):
                    if piece.file not in opened:
                        opened[piece.file] = stack.enter_context(piece.file.open("rb", buffering=0)).fileno()
                    copy_extent(opened[piece.file], target, piece, moved)
                    written += piece.length
                    continue
                write_all(target, piece)
                count = memoryview(piece).nbytes
                written += count
                moved(count)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes where {tensor.nbytes} were planned")


def pieces_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors file of contiguous arrays, piece by piece; none of them is copied."""
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    yield _header([(name, _dtype_name(array.dtype), array.shape) for name, array in ordered], metadata)
    yield from (array.data for _, array in ordered if array.size)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    name = "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
    if name not in WORD_BYTES:
        raise ValueError(f"safetensors has no {dtype}")
    return name


def _header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file of tensors (name, dtype, shape) in this order begins with."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        offsets = [end, end + math.prod(shape) * WORD_BYTES[dtype]]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
