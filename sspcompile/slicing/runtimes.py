"""Which runtimes will load a cut, and for each "no" the reason. Facts of the named versions; see docs/runtimes.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sspcompile.families import Family, Geometry, GgufModel

# What was run in vLLM 0.32: by classes of its own that honour head_dim, and by its Transformers backend, which it
# chooses itself. Its class for Qwen2 derives head_dim as hidden_size / num_attention_heads.
VLLM_NATIVE = frozenset({"llama", "mistral", "qwen3", "granite", "gemma3_text", "phi3"})
VLLM_BACKEND = frozenset({"smollm3", "starcoder2", "seed_oss"})
VLLM_DERIVES_HEAD_DIM = frozenset({"qwen2"})
# What the verdicts were run in: every family and layout, by `make test-runtimes`.
VLLM_VERSION, LLAMA_VERSION = "0.32", "llama-cpp-python 0.3.36"
DEGREES = range(1, 9)
# Named in the sentence; the others are in the data.
USUAL_DEGREES = (1, 2, 4, 8)
# K-quants of llama.cpp pack rows in blocks of this many elements.
K_QUANT_BLOCK = 256


@dataclass(frozen=True)
class Verdict:
    """`loads` with `reason`: how it loads, or why it does not.

    `tensor_parallel`: degree -> "" or the reason why it cannot be split that far; empty where nothing is split.
    """

    runtime: str
    loads: bool
    reason: str
    tensor_parallel: Mapping[int, str] = field(default_factory=dict)


def verdicts(
    geometry: Geometry,
    host: Family,
    counts: Sequence[tuple[int, int]],
    widths: Sequence[int],
    *,
    custom: bool,
    onnx: str | None,
    gguf: GgufModel | str,
) -> tuple[Verdict, ...]:
    """One verdict per runtime for a cut with these (query, key/value) head counts and widths of the MLPs per layer.

    `custom`: the class in the folder loads it. `onnx`: why the ONNX export refuses it, as `graph_refusal` says.
    `gguf`: how the GGUF export writes it, or why it refuses it.
    """
    return (
        *_transformers(host, custom),
        _vllm(geometry, host, counts, widths, custom),
        _onnx(onnx),
        _llama_cpp(geometry, gguf),
    )


def _transformers(host: Family, custom: bool) -> Iterator[Verdict]:
    how = "custom class in the folder: trust_remote_code=True" if custom else f"stock {host.architecture}"
    for version in ("transformers 4.57", "transformers 5"):
        yield Verdict(version, True, how)


def _vllm(
    geometry: Geometry, host: Family, counts: Sequence[tuple[int, int]], widths: Sequence[int], custom: bool
) -> Verdict:
    if not all(heads for heads, _ in counts):
        return Verdict("vLLM", False, "it takes no layer without attention; transformers loads them")
    degrees = {degree: _unsplittable(counts, degree) or _unsplittable_mlp(widths, degree) for degree in DEGREES}
    fine = [str(degree) for degree in USUAL_DEGREES if not degrees[degree]]
    bad = [f"not {degree} ({degrees[degree]})" for degree in USUAL_DEGREES if degrees[degree]]
    parallel = "tensor parallel " + ", ".join([*fine, *bad])
    derived = geometry.hidden == counts[0][0] * geometry.head_dim
    if custom and host.experts is not None:
        return Verdict("vLLM", False, "it takes the same counts for all layers of experts: --layout uniform", degrees)
    if custom:
        how = "--model-impl transformers --trust-remote-code, a KV cache as wide as each layer's"
    elif host.model_type in VLLM_NATIVE or (host.model_type in VLLM_DERIVES_HEAD_DIM and derived):
        how = f"native {host.architecture}"
    elif host.model_type in VLLM_BACKEND:
        how = "by its Transformers backend"
    elif host.model_type in VLLM_DERIVES_HEAD_DIM:
        how = "--host granite, or --model-impl transformers (the native class derives head_dim)"
    else:
        how = "--model-impl transformers"
    return Verdict("vLLM", True, f"{how}; {parallel}; tested with {VLLM_VERSION}", degrees)


def _unsplittable(counts: Sequence[tuple[int, int]], degree: int) -> str:
    """Why the heads of some layer cannot be dealt out to `degree` devices; empty when they can."""
    for layer, (heads, kv_heads) in enumerate(counts):
        where = "every layer" if len(set(counts)) == 1 else f"layer {layer}"
        if heads % degree:
            return f"{where}: {heads} query heads"
        if kv_heads % degree and degree % kv_heads:
            return f"{where}: {kv_heads} key/value heads"
    return ""


def _unsplittable_mlp(widths: Sequence[int], degree: int) -> str:
    """The same of the channels of the MLPs."""
    for layer, width in enumerate(widths):
        if width % degree:
            where = "every layer" if len(set(widths)) == 1 else f"layer {layer}"
            return f"{where}: {width} channels"
    return ""


def _onnx(refusal: str | None) -> Verdict:
    if refusal is not None:
        return Verdict("ONNX Runtime", False, refusal)
    return Verdict("ONNX Runtime", True, "`sspcompile export --format onnx`; any counts per layer")


def _llama_cpp(geometry: Geometry, gguf: GgufModel | str) -> Verdict:
    if isinstance(gguf, str):
        return Verdict("llama.cpp", False, gguf)
    odd = ["o_proj"] if any(heads * geometry.head_dim % K_QUANT_BLOCK for heads, _ in gguf.counts) else []
    odd += ["down_proj"] if any(width % K_QUANT_BLOCK for width in gguf.widths) else []
    quants = f"; K-quants of {' and '.join(odd)} fall back (rows are not a multiple of {K_QUANT_BLOCK})" if odd else ""
    padded = ", padded to the widest layer" if gguf.form.padded and gguf.arrays else ""
    how = f"`sspcompile export --format gguf`, as architecture {gguf.form.architecture}{padded}"
    return Verdict("llama.cpp", True, f"{how}{quants}; tested with {LLAMA_VERSION}")
