"""Which runtimes will load a cut, and for each "no" the reason. Facts of the named versions; see docs/runtimes.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sspcompile.families import Family, Geometry

# ONNX Runtime's CPU GroupQueryAttention with rotary inside fails when run, not when built, for other head sizes.
ONNX_HEAD_DIM_MULTIPLE = 16
# Native vLLM classes (0.33) of these types derive head_dim as hidden_size / num_attention_heads.
VLLM_DERIVES_HEAD_DIM = frozenset({"qwen2"})


@dataclass(frozen=True)
class Verdict:
    """`loads` with `reason`: how it loads, or why it does not."""

    runtime: str
    loads: bool
    reason: str


def verdicts(geometry: Geometry, host: Family, counts: Sequence[tuple[int, int]]) -> tuple[Verdict, ...]:
    """One verdict per runtime for a cut with these (query, key/value) head counts per layer."""
    uniform = len(set(counts)) == 1
    return (
        _transformers(host, uniform),
        _vllm(geometry, host, counts, uniform),
        _onnx(geometry),
        _llama_cpp(geometry, uniform),
    )


def _transformers(host: Family, uniform: bool) -> Verdict:
    if uniform:
        return Verdict("transformers 4.57 and 5", True, f"stock {host.architecture}")
    return Verdict("transformers 4.57 and 5", True, "custom class in the folder: trust_remote_code=True")


def _vllm(geometry: Geometry, host: Family, counts: Sequence[tuple[int, int]], uniform: bool) -> Verdict:
    degrees = [tp for tp in (1, 2, 4, 8) if all(q % tp == 0 and (kv % tp == 0 or tp % kv == 0) for q, kv in counts)]
    parallel = "tensor parallel " + ", ".join(map(str, degrees))
    if not uniform:
        return Verdict("vLLM", True, f"--model-impl transformers --trust-remote-code; {parallel}; not run here")
    derived = geometry.hidden == counts[0][0] * geometry.head_dim
    if host.model_type in VLLM_DERIVES_HEAD_DIM and not derived:
        return Verdict("vLLM", True, f"--model-impl transformers (the native class derives head_dim); {parallel}")
    return Verdict("vLLM", True, f"native {host.architecture}; {parallel}")


def _onnx(geometry: Geometry) -> Verdict:
    if geometry.head_dim % ONNX_HEAD_DIM_MULTIPLE:
        reason = f"GroupQueryAttention wants head_dim % {ONNX_HEAD_DIM_MULTIPLE} == 0, it is {geometry.head_dim}"
        return Verdict("ONNX Runtime", False, reason)
    return Verdict("ONNX Runtime", True, "GroupQueryAttention takes one head count per layer")


def _llama_cpp(geometry: Geometry, uniform: bool) -> Verdict:
    kind = geometry.family.model_type
    if uniform:
        how = {"qwen2": "as architecture llama or seed_oss", "qwen3": "as architecture qwen3"}
        return Verdict("llama.cpp", True, how.get(kind, "as architecture llama") + "; write the GGUF directly")
    how = "step35" if kind == "qwen3" else "deci"
    return Verdict("llama.cpp", True, f"as architecture {how} with per-layer head counts; write the GGUF directly")
