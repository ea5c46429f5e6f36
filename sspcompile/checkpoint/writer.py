"""Writing safetensors shards as a stream: headers first, since all sizes are known from the plan, then the bytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME, WORD_BYTES

DEFAULT_SHARD_BYTES = 5_000_000_000
# transformers refuses a file whose metadata names no framework.
METADATA = {"format": "pt"}
COMPANION_PATTERNS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written. `content` yields its bytes in order, at most a buffer at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WORD_BYTES[self.dtype]


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `tensors` in their order as model.safetensors, or as shards with an index when they exceed the limit.

    `progress` receives the number of bytes just written. At most one buffer of one tensor is in memory.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_NAME, shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


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


def _write_file(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None] | None) -> None:
    # Descending word size keeps every tensor aligned to its own width, as the reference writer does.
    tensors = sorted(tensors, key=lambda tensor: -WORD_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            start = stream.tell()
            for piece in tensor.content():
                stream.write(piece)
                if progress is not None:
                    progress(len(piece))
            if stream.tell() - start != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {stream.tell() - start} bytes where {tensor.nbytes} were planned")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation settings and licence byte for byte; returns the names."""
    names = sorted({path.name for pattern in COMPANION_PATTERNS for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
