"""One matrix or two: whether the head is the embedding, where configuration and weights say different things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sspcompile.checkpoint.tensors import EMBEDDING, LM_HEAD
from sspcompile.checkpoint.transfer import Extent, read_all
from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry

if TYPE_CHECKING:
    from sspcompile.checkpoint.headers import TensorInfo

CHUNK_BYTES = 16 << 20


def untied_by_weights(geometry: Geometry, tensors: Mapping[str, TensorInfo]) -> Geometry:
    """The same geometry, without the tie that config.json states when the files hold a head of its own.

    transformers 5 then warns and computes with the head (`tie_weights` in modeling_utils.py), 4.57 with the embedding.
    Many checkpoints hold the embedding twice; that is a tie. Raises CheckpointError for a head of another shape.
    """
    head, table = tensors.get(LM_HEAD), tensors.get(EMBEDDING)
    if not geometry.tied or head is None or table is None:
        return geometry
    if head.shape != (geometry.vocab, geometry.hidden):
        raise CheckpointError(
            f"{LM_HEAD} has shape {list(head.shape)}; config.json asks for {[geometry.vocab, geometry.hidden]}.",
            hint="config.json and weights must be of the same model.",
        )
    # The same numbers in two dtypes are two matrices: what they compute is the same either way.
    if head.dtype == table.dtype and head.shape == table.shape and _same_bytes(head.extent, table.extent):
        return geometry
    return replace(geometry, tied=False)


def _same_bytes(one: Extent, other: Extent) -> bool:
    buffers = [memoryview(bytearray(min(CHUNK_BYTES, one.length))) for _ in range(2)]
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        for start in range(0, one.length, CHUNK_BYTES):
            parts = [buffer[: one.length - start] for buffer in buffers]
            for stream, part, extent in zip((first, second), parts, (one, other), strict=True):
                if not read_all(stream.fileno(), part, extent.offset + start):
                    raise CheckpointError(
                        f"{extent.file.name} is shorter than its header says.", hint="Download it again."
                    )
            if parts[0] != parts[1]:
                return False
    return True
