"""An ONNX export under measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.model.onnx_session import GRAPH, OnnxModel

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto


class OnnxRunner:
    """An open session and its fixed token ids. Requests and replies are those of `worker`."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import onnxruntime  # noqa: F401  an import is not loading

        folder = Path(request["path"])
        start = time.perf_counter()
        self.model = OnnxModel.open(folder, provider=request["device"], threads=request["threads"], spin=True)
        self.load_seconds = time.perf_counter() - start
        self.folder = folder
        self.seed = request["seed"]

    def facts(self) -> dict[str, Any]:
        """Sizes in bytes, read from the graph; a tied table is one tensor of the graph and counts once."""
        import onnx

        graph = onnx.load(self.folder / GRAPH, load_external_data=False).graph
        sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
        return {
            "load_seconds": self.load_seconds,
            "weight_bytes": sum(sizes.values()),
            "step_weight_bytes": sum(sizes.values()) - sum(sizes[name] for name in _only_looked_up(graph)),
            "disk_bytes": sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix in WEIGHT_FILES),
            "architecture": "ONNX",
            "dtype": _dtype(graph),
        }

    def trial(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """One prefill and `new_tokens - 1` decode steps over a cache that has room for all of them."""
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(0, self.model.vocab, (batch, prompt_tokens + new_tokens))
        start = time.perf_counter()
        logits, cache = self.model.prefill(ids[:, :prompt_tokens], capacity=prompt_tokens + new_tokens)
        logits[:, -1].argmax(-1).tolist()
        prefill, steps = time.perf_counter() - start, []
        for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):
            start = time.perf_counter()
            self.model.step(ids[:, position], cache).argmax(-1).tolist()
            steps.append(time.perf_counter() - start)
        shapes = self.model.cache_shapes(1, 1).values()
        held = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes)
        return {"prefill_seconds": prefill, "decode_seconds": steps, "kv_bytes_per_token": held}

    def device_bytes(self) -> int | None:
        """ONNX Runtime does not say what it holds on a device."""
        return None


WEIGHT_FILES = (".safetensors", ".onnx", ".data")


def _bytes(tensor: TensorProto) -> int:
    """What a tensor occupies, inside the graph's file or beside it."""
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return tensor.ByteSize()


def _only_looked_up(graph: GraphProto) -> set[str]:
    """Tables of which a step reads rows: those that nothing but Gather takes."""
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    used = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    return {tensor.name for tensor in graph.initializer if tensor.name in tables} - used


def _dtype(graph: GraphProto) -> str:
    from onnx import TensorProto

    widths = {int(a.i) for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    if widths:
        return "/".join(f"int{bits}" for bits in sorted(widths))
    cache = next(value for value in graph.input if value.name.startswith("past_key_values."))
    return {TensorProto.FLOAT16: "float16", TensorProto.FLOAT: "float32"}[cache.type.tensor_type.elem_type]
