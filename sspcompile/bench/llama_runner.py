"""A GGUF export under measurement, in llama.cpp on the processor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.model.llama_session import MODEL, LlamaModel

if TYPE_CHECKING:
    from gguf import GGUFReader

# Keys and values are kept in fp16, as llama.cpp does unless it is told otherwise.
CACHE_BYTES = 2
TABLE, HEAD = "token_embd.weight", "output.weight"


class LlamaRunner:
    """An open file and its fixed token ids. Requests and replies are those of `worker`."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import llama_cpp  # noqa: F401  an import is not loading

        self.path = Path(request["path"]) / MODEL
        start = time.perf_counter()
        self.model = LlamaModel(self.path, threads=request["threads"], context=request["positions"])
        self.load_seconds = time.perf_counter() - start
        self.seed = request["seed"]
        self.cache_bytes = 0

    def facts(self) -> dict[str, Any]:
        """Sizes in bytes, read from the file. A table that is the head as well is one tensor there and counts once."""
        from gguf import GGUFReader

        reader = GGUFReader(self.path)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        self.cache_bytes = _cache_bytes(reader)
        return {
            "load_seconds": self.load_seconds,
            "weight_bytes": sum(sizes.values()),
            "step_weight_bytes": sum(sizes.values()) - (sizes[TABLE] if HEAD in sizes else 0),
            "disk_bytes": self.path.stat().st_size,
            "architecture": f"llama.cpp {_said(reader, 'general.architecture')}",
            "dtype": "/".join(sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1})),
        }

    def trial(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """One prefill and `new_tokens - 1` decode steps of one text."""
        if batch != 1:
            raise ValueError("one text at a time")
        ids = np.random.default_rng(self.seed).integers(0, self.model.vocab, prompt_tokens + new_tokens).tolist()
        start = time.perf_counter()
        self.model.start(ids[:prompt_tokens], prompt_tokens + new_tokens).argmax()
        prefill, steps = time.perf_counter() - start, []
        for token in ids[prompt_tokens:-1]:
            start = time.perf_counter()
            self.model.read([token]).argmax()
            steps.append(time.perf_counter() - start)
        return {"prefill_seconds": prefill, "decode_seconds": steps, "kv_bytes_per_token": self.cache_bytes}

    def device_bytes(self) -> int | None:
        """Nothing runs on a device."""
        return None


def _said(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the file has no {key}")
    return field.contents()


def _cache_bytes(reader: GGUFReader) -> int:
    """Of the keys and values of a token."""
    stem = _said(reader, "general.architecture")
    groups = _said(reader, f"{stem}.attention.head_count_kv")
    layers = _said(reader, f"{stem}.block_count")
    total = sum(groups) if isinstance(groups, list) else groups * layers
    sides = sum(_said(reader, f"{stem}.attention.{side}_length") for side in ("key", "value"))
    return int(total * sides * CACHE_BYTES)
