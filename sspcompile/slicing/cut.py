"""The surgery: which bytes of which tensor stay. Everything else is copied as it is.

Rows of q/k/v and columns of o belong to heads: head h owns q_proj rows h*D .. (h+1)*D and the same columns of o_proj;
key/value head g owns k_proj and v_proj rows g*D .. (g+1)*D (D = head_dim).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.writer import OutputTensor
from sspcompile.families import layer_prefix
from sspcompile.slicing.plan import SlicePlan

BUFFER_BYTES = 1 << 24
Content = Callable[[], Iterable[bytes | memoryview]]


def cut_tensors(
    checkpoint: Checkpoint, plan: SlicePlan, *, replaced: Mapping[str, np.ndarray] | None = None
) -> list[OutputTensor]:
    """The tensors of the smaller checkpoint, in the source's order, read only when they are written.

    `replaced` holds tensors that a repair computed, as raw words in the output's shape.
    """
    roles = _roles(plan)
    outputs = []
    for name, (shape, dtype) in plan.tensors.items():
        if replaced is not None and name in replaced:
            content = _constant(replaced[name])
        elif name in roles and checkpoint.tensors[name].shape != shape:
            axis, kept = roles[name]
            content = _rows(checkpoint, name, kept, plan) if axis == 0 else _columns(checkpoint, name, kept, plan)
        else:
            content = _whole(checkpoint, name)
        outputs.append(OutputTensor(name, dtype, shape, content))
    return outputs


def _roles(plan: SlicePlan) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Tensor name -> (axis that is cut, kept blocks of head_dim along it)."""
    roles: dict[str, tuple[int, tuple[int, ...]]] = {}
    for index, layer in enumerate(plan.layers):
        attention = layer_prefix(index) + "self_attn."
        for projection, kept in (("q_proj", layer.heads), ("k_proj", layer.groups), ("v_proj", layer.groups)):
            roles[f"{attention}{projection}.weight"] = (0, kept)
            roles[f"{attention}{projection}.bias"] = (0, kept)
        roles[attention + "o_proj.weight"] = (1, layer.heads)
    return roles


def _constant(words: np.ndarray) -> Content:
    return lambda: [memoryview(np.ascontiguousarray(words)).cast("B")]


def _whole(checkpoint: Checkpoint, name: str) -> Content:
    return lambda: checkpoint.chunks(name, BUFFER_BYTES)


def _rows(checkpoint: Checkpoint, name: str, kept: Sequence[int], plan: SlicePlan) -> Content:
    """Kept blocks of rows; neighbouring blocks are one read."""

    def content() -> Iterator[memoryview]:
        size = plan.geometry.head_dim
        row_bytes = checkpoint.tensors[name].nbytes // checkpoint.tensors[name].shape[0]
        step = max(1, BUFFER_BYTES // row_bytes)
        for start, stop in _runs(kept):
            for row in range(start * size, stop * size, step):
                words = checkpoint.read_rows(name, row, min(row + step, stop * size))
                yield memoryview(words).cast("B")

    return content


def _columns(checkpoint: Checkpoint, name: str, kept: Sequence[int], plan: SlicePlan) -> Content:
    """Kept blocks of columns, a band of rows at a time: [rows, heads * D] -> [rows, kept * D]."""

    def content() -> Iterator[memoryview]:
        size = plan.geometry.head_dim
        info = checkpoint.tensors[name]
        columns = np.concatenate([np.arange(head * size, (head + 1) * size) for head in kept])
        step = max(1, BUFFER_BYTES // (info.nbytes // info.shape[0]))
        for row in range(0, info.shape[0], step):
            band = checkpoint.read_rows(name, row, min(row + step, info.shape[0]))
            yield memoryview(np.ascontiguousarray(band[:, columns])).cast("B")

    return content


def _runs(kept: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending indices -> half-open runs of neighbours: (0, 1, 4) -> (0, 2), (4, 5)."""
    for _, group in groupby(enumerate(kept), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        yield members[0], members[-1] + 1
