"""What is measured, how it is defined, and which direction is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """`exact` metrics are counted, not timed: one value says it all."""

    name: str
    label: str
    unit: Literal["s", "tokens/s", "bytes", "count"]
    lower_is_better: bool
    exact: bool
    definition: str


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "prefill_seconds", "time to first token", "s", True, False,
            "from handing over the prompt to having chosen the first new token; the key/value cache is filled",
        ),
        Metric(
            "prefill_tokens_per_second", "prefill", "tokens/s", False, False,
            "batch * prompt tokens / time to first token",
        ),
        Metric(
            "inter_token_seconds", "inter-token latency", "s", True, False,
            "mean time per further token of one trial, the first token not counted",
        ),
        Metric(
            "decode_tokens_per_second", "decode", "tokens/s", False, False,
            "batch / inter-token latency",
        ),
        Metric(
            "load_seconds", "load", "s", True, False,
            "from the folder to a model ready to run, imports not counted; one sample per process",
        ),
        Metric(
            "peak_resident_bytes", "peak resident memory", "bytes", True, False,
            "of a fresh process over loading and all trials, libraries included; one sample per process",
        ),
        Metric(
            "peak_device_bytes", "peak device memory", "bytes", True, False,
            "allocated on the device over all trials; one sample per process",
        ),
        Metric("parameters", "parameters", "count", True, True, "numbers in all weight tensors, tied ones once"),
        Metric("weight_bytes", "weights", "bytes", True, True, "bytes of all weight tensors, tied ones once"),
        Metric(
            "kv_bytes_per_token", "KV cache per token", "bytes", True, True,
            "2 * sum over layers of kv heads * head_dim * bytes, read from the cache's own tensors",
        ),
    )
}  # fmt: skip
