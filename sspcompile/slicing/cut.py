"""The surgery: which bytes of which tensor stay. Everything else is copied as it is.

Rows that stay (of q/k/v, of gate and up) are runs of neighbouring bytes, moved without being looked at. Columns of
o_proj and down_proj are gathered a band of rows at a time, through two buffers that are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from sspcompile.checkpoint.headers import WORD_DTYPE, dtype_bytes, fill
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import Blocks, attention_blocks, channel_blocks
from sspcompile.checkpoint.transfer import Extent
from sspcompile.checkpoint.writer import OutputTensor, Piece, content_of
from sspcompile.slicing.plan import SlicePlan

# Large enough for sequential reads at full speed, small enough to stay in the processor's cache between read and write.
BAND_BYTES = 4 << 20
Content = Callable[[], Iterable[Piece]]


def cut_tensors(
    checkpoint: Checkpoint, plan: SlicePlan, *, replaced: Mapping[str, np.ndarray] | None = None
) -> list[OutputTensor]:
    """The tensors of the smaller checkpoint, in the source's order, read only when they are written.

    `replaced` holds tensors that a repair computed, by the source's names, as raw words in the output's shape.
    """
    replaced = replaced or {}
    blocks = _roles(plan)
    outputs = []
    for name, (shape, dtype) in plan.tensors.items():
        source = plan.sources[name]
        info = checkpoint.tensors.get(source)
        whole = None
        if source in replaced:
            content = _computed(replaced, source)
        elif info is None:
            content = content_of(np.zeros(shape, dtype=WORD_DTYPE[dtype_bytes(dtype)]))
        elif info.shape == shape and _in_order(blocks.get(name)):
            content = _extents([info.extent])
            # A file with this tensor under another name, or inside of a stack, is not the file to be written.
            whole = info.extent if checkpoint.stored.get(name) == info else None
        else:
            part = blocks[source]
            content = (_rows if part.axis == 0 else _columns)(checkpoint, source, part)
        outputs.append(
            OutputTensor(name, dtype, shape, content, unchanged=whole, shard=info.file.name if info is not None else "")
        )
    return outputs


def _roles(plan: SlicePlan) -> dict[str, Blocks]:
    """Tensor name -> what stays of it."""
    blocks: dict[str, Blocks] = {}
    for index in plan.staying:
        layer = plan.layers[index]
        blocks |= attention_blocks(plan.geometry, index, layer.heads, layer.groups)
        if layer.channels is not None:
            blocks |= channel_blocks(plan.geometry, index, layer.channels)
    return blocks


def _in_order(part: Blocks | None) -> bool:
    """Whether nothing moves in a tensor that keeps its shape: a nested model reorders what it keeps."""
    return part is None or part.kept == tuple(range(len(part.kept)))


def _computed(replaced: Mapping[str, np.ndarray], name: str) -> Content:
    """Asked for when it is written: a member of a nested artifact is put together matrix by matrix."""
    return lambda: [np.ascontiguousarray(replaced[name]).data.cast("B")]


def _extents(extents: Sequence[Extent]) -> Content:
    return lambda: extents


def _rows(checkpoint: Checkpoint, name: str, part: Blocks) -> Content:
    """Kept blocks of rows; neighbouring blocks are one extent."""
    info = checkpoint.tensors[name]
    return _extents([info.rows(start * part.size, stop * part.size) for start, stop in runs(part.kept)])


def _columns(checkpoint: Checkpoint, name: str, part: Blocks) -> Content:
    """Kept blocks of columns, a band of rows at a time: [rows, blocks, size] -> [rows, kept, size]."""

    def content() -> Iterator[memoryview]:
        info = checkpoint.tensors[name]
        rows, word = info.shape[0], WORD_DTYPE[info.word_bytes]
        step = max(1, min(rows, BAND_BYTES // info.row_bytes))
        band = np.empty((step, info.shape[1] // part.size, part.size), dtype=word)
        gathered = np.empty((step, len(part.kept), part.size), dtype=word)
        columns = np.asarray(part.kept)
        with info.file.open("rb", buffering=0) as stream:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                fill(stream.fileno(), band[:count], info.file, info.rows(row, row + count).offset)
                # mode="clip" writes straight into `out`; the default would go through a copy of it.
                np.take(band[:count], columns, axis=1, out=gathered[:count], mode="clip")
                yield gathered[:count].data.cast("B")

    return content


def runs(kept: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Indices -> half-open runs of neighbours: (0, 1, 4) -> (0, 2), (4, 5)."""
    for _, group in groupby(enumerate(kept), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        yield members[0], members[-1] + 1
