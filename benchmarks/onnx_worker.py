"""One contender of `onnx.py` in a process of its own: python -m benchmarks.onnx_worker KIND FOLDER REQUEST.

KIND is `transformers` (sdpa, fp32), `onnx` (a graph whose cache can be one buffer, in ONNX Runtime) or `growing` (one
whose cache grows by concatenation). Prints JSON: seconds of loading, of one prefill, of every decoding step by context,
and the peak resident memory. Steps start from a cache of random content, which costs what a real one costs.

KIND `pair` holds two graphs (the second folder is REQUEST's `other`) in one process and goes from one to the other and
back: what the machine does in the meantime happens to both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sspcompile.model.onnx_session import Cache, OnnxModel

WARM_STEPS = 3


def transformers_steps(folder: Path, threads: int, prompt: int, contexts: list[int], steps: int) -> dict[str, object]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from sspcompile.model.cache import cache_argument
    from sspcompile.slicing.configuration import MODELING_FILE

    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=(folder / MODELING_FILE).is_file()
    ).eval()
    found: dict[str, object] = {"load": time.perf_counter() - start}
    size = model.config.head_dim
    counts = [layer.self_attn.k_proj.out_features // size for layer in model.model.layers]
    with torch.inference_mode():
        ids = torch.arange(prompt)[None]
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        found["prefill"] = time.perf_counter() - start
        for context in contexts:
            cache, times = DynamicCache(), []
            for layer, heads in enumerate(counts):
                cache.update(torch.randn(1, heads, context, size), torch.randn(1, heads, context, size), layer)
            for step in range(WARM_STEPS + steps):
                start = time.perf_counter()
                model(
                    input_ids=torch.tensor([[7]]),
                    position_ids=torch.tensor([[context + step]]),
                    use_cache=True,
                    **{cache_argument(model): cache},
                )
                times.append(time.perf_counter() - start)
            found[f"step {context}"] = times[WARM_STEPS:]
    return found


def onnx_steps(folder: Path, threads: int, prompt: int, contexts: list[int], steps: int) -> dict[str, object]:
    from sspcompile.model.onnx_session import OnnxModel

    start = time.perf_counter()
    model = OnnxModel.open(folder, threads=threads, spin=True)
    found: dict[str, object] = {"load": time.perf_counter() - start}
    ids = np.arange(prompt)[None]
    model.prefill(ids)
    start = time.perf_counter()
    model.prefill(ids)
    found["prefill"] = time.perf_counter() - start
    for context in contexts:
        cache, times = random_cache(model, context, WARM_STEPS + steps), []
        for _ in range(WARM_STEPS + steps):
            start = time.perf_counter()
            model.step(np.array([7]), cache)
            times.append(time.perf_counter() - start)
        found[f"step {context}"] = times[WARM_STEPS:]
    return found


def pair_steps(
    folder: Path, threads: int, contexts: list[int], steps: int, other: str, visits: int
) -> dict[str, list[list[float]]]:
    """By context, for either graph the median seconds of `steps` steps at each of its visits."""
    from sspcompile.model.onnx_session import OnnxModel

    models = [OnnxModel.open(place, threads=threads, spin=True) for place in (folder, Path(other))]
    found: dict[str, list[list[float]]] = {}
    for context in contexts:
        caches = [random_cache(model, context, steps + 1) for model in models]
        medians: list[list[float]] = [[], []]
        for visit in range(visits):
            for which in (0, 1) if visit % 2 else (1, 0):
                model, cache = models[which], caches[which]
                cache.mask = cache.mask[:, :context]
                model.step(np.array([7]), cache)  # the other graph's weights fill the processor's cache
                times = []
                for _ in range(steps):
                    start = time.perf_counter()
                    model.step(np.array([7]), cache)
                    times.append(time.perf_counter() - start)
                medians[which].append(float(np.median(times)))
        found[f"step {context}"] = medians
    return found


def random_cache(model: OnnxModel, context: int, room: int) -> Cache:
    """Room for `room` more tokens behind `context` tokens of random keys and values."""
    import onnxruntime as ort

    from sspcompile.model.onnx_session import Cache

    rng = np.random.default_rng(0)
    buffers = {}
    for name, (shape, dtype) in model.cache_shapes(1, context + room).items():
        content = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(content)
    return Cache(buffers, np.ones((1, context), dtype=np.int64))


def growing_steps(folder: Path, threads: int, prompt: int, contexts: list[int], steps: int) -> dict[str, object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    start = time.perf_counter()
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found: dict[str, object] = {"load": time.perf_counter() - start}
    heads = json.loads((folder / "heads.json").read_text())  # [kv heads, head size]
    names = [value.name for value in session.get_inputs()]
    past_names = [name for name in names if name.startswith("past_key_values.")]

    def run(ids: np.ndarray, past: dict[str, object], length: int) -> dict[str, object]:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        if "attention_mask" in names:
            binding.bind_cpu_input("attention_mask", np.ones((1, length + ids.shape[1]), dtype=np.int64))
        if "position_ids" in names:
            binding.bind_cpu_input("position_ids", np.arange(length, length + ids.shape[1])[None])
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        kept = dict(zip((value.name for value in session.get_outputs()), binding.get_outputs(), strict=True))
        return {name: kept[name.replace("past_key_values.", "present.")] for name in past_names}

    rng = np.random.default_rng(0)

    def cache(length: int) -> dict[str, object]:
        shape = (1, heads[0], length, heads[1])
        return {n: ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, dtype=np.float32)) for n in past_names}

    run(np.arange(prompt)[None], cache(1), 1)
    start = time.perf_counter()
    run(np.arange(prompt)[None], cache(1), 1)
    found["prefill"] = time.perf_counter() - start
    for context in contexts:
        past, times = cache(context), []
        for step in range(WARM_STEPS + steps):
            start = time.perf_counter()
            past = run(np.array([[7]]), past, context + step)
            times.append(time.perf_counter() - start)
        found[f"step {context}"] = times[WARM_STEPS:]
    return found


def main(kind: str, folder: str, request: str) -> None:
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "transformers": transformers_steps,
        "onnx": onnx_steps,
        "growing": growing_steps,
        "pair": pair_steps,
    }
    found = runs[kind](Path(folder), **json.loads(request))
    # Not ru_maxrss: that one remembers the process which started this one.
    found["peak_bytes"] = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
