"""One contender in a process of its own: `python -m sspcompile.measure.worker`, JSON lines on stdin and stdout.

Requests: `{"do": "load", ...}` once, then `{"do": "trial", ...}` as often as wanted, `{"do": "memory"}`,
`{"do": "quit"}`. Each gets one line in reply. Computing happens between a request and its reply only, so that two
live workers never compete. An exception ends the process; its traceback is on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch
    from torch import nn


class Runner:
    """A loaded model and its fixed token ids."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(request["threads"])
        self.device = torch.device(request["device"])
        trust = request["trust_remote_code"]
        config = AutoConfig.from_pretrained(request["path"], trust_remote_code=trust, local_files_only=True)
        # transformers imports a model's module when it is first needed, seconds that are not loading. A model without
        # storage brings the import forward.
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            request["path"], dtype="auto", trust_remote_code=trust, local_files_only=True
        )
        self.model: nn.Module = model.requires_grad_(False).eval().to(self.device)
        self._synchronize()
        self.load_seconds = time.perf_counter() - start
        self.seed = request["seed"]

    def facts(self) -> dict[str, Any]:
        """Sizes in bytes; tied tensors are one parameter of the module and count once."""
        parameters = list(self.model.parameters())
        config = self.model.config.get_text_config()
        return {
            "load_seconds": self.load_seconds,
            "parameters": sum(p.numel() for p in parameters),
            "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "max_position_embeddings": getattr(config, "max_position_embeddings", None),
            "architecture": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def trial(self, prompt_tokens: int, new_tokens: int, batch: int) -> dict[str, Any]:
        """One prefill and `new_tokens - 1` decode steps; the ids are fixed, so end-of-sequence has no effect."""
        import torch

        ids = self._ids(batch, prompt_tokens + new_tokens)
        steps = []
        with torch.inference_mode():
            self._synchronize()
            start = time.perf_counter()
            out = self.model(input_ids=ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()  # tolist() waits for the device
            prefill = time.perf_counter() - start
            cache = out.past_key_values
            kv_bytes = kv_bytes_per_token(cache)
            for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):
                start = time.perf_counter()
                out = self.model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                out.logits[:, -1].argmax(-1).tolist()
                steps.append(time.perf_counter() - start)
        return {"prefill_seconds": prefill, "decode_seconds": steps, "kv_bytes_per_token": kv_bytes}

    def memory(self) -> dict[str, Any]:
        """Peak bytes so far, resident and (with a device) allocated there."""
        import torch

        device = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {"peak_resident_bytes": peak_resident_bytes(), "peak_device_bytes": device}

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        vocab = self.model.config.get_text_config().vocab_size
        return torch.randint(0, vocab, (batch, tokens), generator=generator).to(self.device)

    def _synchronize(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def kv_bytes_per_token(cache: Any) -> int:
    """Bytes that one token of one sequence takes in a transformers cache, summed over layers.

    Keys and values are [batch, kv_heads, tokens, head_dim]; a layer without attention holds none.
    """
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None and tensor.numel():
                total += tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    return total


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux carries the *parent's* resident size over fork and exec into it.
        line = next(line for line in status.read_text("ascii", "replace").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until `quit` or the end of the input (the parent has gone)."""
    runner: Runner | None = None
    import torch  # noqa: F401  the imports happen before the first request, so that two workers import side by side
    import transformers  # noqa: F401

    _reply(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        if request["do"] == "load":
            runner = Runner(request)
            _reply(replies, runner.facts())
        elif runner is None:
            raise RuntimeError("a trial was asked for before a load")
        elif request["do"] == "trial":
            _reply(replies, runner.trial(request["prompt_tokens"], request["new_tokens"], request["batch"]))
        elif request["do"] == "memory":
            _reply(replies, runner.memory())


def _reply(replies: TextIO, value: Mapping[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def main() -> None:
    # Libraries print to stdout; the protocol gets a descriptor of its own and theirs goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
