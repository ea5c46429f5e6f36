"""What is measured, how it is defined, and which direction is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """`scope`: whether a value belongs to one load, to a process, or to the model itself, which is counted once."""

    name: str
    label: str
    unit: Literal["s", "tokens/s", "bytes", "count"]
    lower_is_better: bool
    scope: Literal["load", "process", "model"]
    definition: str

    @property
    def exact(self) -> bool:
        """Counted, not timed: one value says it all."""
        return self.scope == "model"


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "prefill_seconds",
            "time to first token",
            "s",
            True,
            "load",
            "from handing over the prompt to having chosen the first new token; the key/value cache is filled",
        ),
        Metric(
            "prefill_tokens_per_second",
            "prefill",
            "tokens/s",
            False,
            "load",
            "batch * prompt tokens / time to first token",
        ),
        Metric(
            "inter_token_seconds",
            "inter-token latency",
            "s",
            True,
            "load",
            "mean time per further token of one trial, the first token not counted",
        ),
        Metric(
            "inter_token_p50_seconds",
            "inter-token latency p50",
            "s",
            True,
            "load",
            "median over the further tokens of one trial",
        ),
        Metric(
            "inter_token_p90_seconds",
            "inter-token latency p90",
            "s",
            True,
            "load",
            "90th percentile over the further tokens of one trial",
        ),
        Metric("decode_tokens_per_second", "decode", "tokens/s", False, "load", "batch / inter-token latency"),
        Metric(
            "load_seconds",
            "load",
            "s",
            True,
            "process",
            "from the folder to a model ready to run, imports not counted; one sample per process",
        ),
        Metric(
            "peak_resident_bytes",
            "peak resident memory",
            "bytes",
            True,
            "process",
            "of a fresh process over loading and all trials, libraries included; one sample per process",
        ),
        Metric(
            "peak_device_bytes",
            "peak device memory",
            "bytes",
            True,
            "process",
            "allocated on the device over all trials; one sample per process",
        ),
        Metric("parameters", "parameters", "count", True, "model", "numbers in all weight tensors, tied ones once"),
        Metric("weight_bytes", "weights in memory", "bytes", True, "model", "of all weight tensors, tied ones once"),
        Metric("disk_bytes", "weights on disk", "bytes", True, "model", "of the files that hold weights"),
        Metric(
            "kv_bytes_per_token",
            "KV cache per token",
            "bytes",
            True,
            "model",
            "2 * sum over layers of kv heads * head_dim * bytes, read from the cache's own tensors",
        ),
    )
}

# Of a server, as whoever asks it sees it over HTTP. All requests of a load are sent at once; their connections are open
# already where the server keeps them.
SERVER_METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "first_token_seconds",
            "time to first token",
            "s",
            True,
            "load",
            "from sending a request to the first piece of text of its stream, waiting behind others included",
        ),
        Metric(
            "token_interval_seconds",
            "inter-token latency",
            "s",
            True,
            "load",
            "of one request: from the first piece of text to the last, over the number of new tokens less one",
        ),
        Metric(
            "output_tokens_per_second",
            "throughput",
            "tokens/s",
            False,
            "load",
            "new tokens of all requests that were sent at once / time until the last of them had ended",
        ),
    )
}
