"""A transformers model under measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspcompile.bench.memory import kv_bytes_per_token
from sspcompile.checkpoint.source import file_order, loading_keys
from sspcompile.model.placement import wait_for

if TYPE_CHECKING:
    import torch


class TorchRunner:
    """A loaded model and its fixed token ids. Requests and replies are those of `worker`."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from sspcompile.model.opening import open_config, open_model, readable
        from sspcompile.model.weights import input_device

        torch.set_num_threads(request["threads"])
        self.device = torch.device(request["device"])
        device_map = request.get("device_map")
        spread = {} if device_map is None else {"device_map": device_map}
        path, trust = Path(request["path"]), request["trust_remote_code"]
        with readable(path):
            # transformers imports a model's module when it is first needed, seconds that are not loading. A model
            # without storage brings the import forward.
            with torch.device("meta"):
                config = open_config(path, trust_remote_code=trust)
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
            keys = loading_keys(path) or None
            start = time.perf_counter()
            model = open_model(
                path,
                dtype=request.get("dtype", "auto"),
                trust_remote_code=trust,
                local_files_only=True,
                key_mapping=keys,
                **spread,
            )
        self.model: Any = model.requires_grad_(False).eval()
        if spread:
            self.device = input_device(self.model)
        else:
            self.model.to(self.device)
        wait_for(self.device)
        self.load_seconds = time.perf_counter() - start
        self.seed = request["seed"]
        self.disk_bytes = sum(file.stat().st_size for file in file_order(path))

    def facts(self) -> dict[str, Any]:
        """Sizes in bytes; tied tensors are one parameter of the module and count once. A step reads all but a table of
        which it only looks up rows."""
        parameters = list(self.model.parameters())
        weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        table, head = (
            getattr(m, "weight", None) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        looked_up = 0 if table is None or table is head else table.numel() * table.element_size()
        return {
            "load_seconds": self.load_seconds,
            "parameters": sum(p.numel() for p in parameters),
            "weight_bytes": weight_bytes,
            "step_weight_bytes": weight_bytes - looked_up,
            "disk_bytes": self.disk_bytes,
            "architecture": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def trial(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """One prefill and `new_tokens - 1` decode steps; the ids are fixed, so end-of-sequence has no effect."""
        import torch

        from sspcompile.model.cache import cache_argument, cache_of

        ids = self._ids(batch, prompt_tokens + new_tokens)
        steps = []
        with torch.inference_mode():
            wait_for(self.device)
            start = time.perf_counter()
            out = self.model(input_ids=ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()  # tolist() waits for the device
            prefill = time.perf_counter() - start
            cache = cache_of(out)
            kv_bytes = kv_bytes_per_token(cache)
            kept = {cache_argument(self.model): cache, "use_cache": True}
            for position in range(prompt_tokens, prompt_tokens + new_tokens - 1):
                start = time.perf_counter()
                out = self.model(input_ids=ids[:, position : position + 1], **kept)
                out.logits[:, -1].argmax(-1).tolist()
                steps.append(time.perf_counter() - start)
        return {"prefill_seconds": prefill, "decode_seconds": steps, "kv_bytes_per_token": kv_bytes}

    def device_bytes(self) -> int | None:
        """Peak bytes allocated on the device so far; None on the CPU."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        vocab = self.model.config.get_text_config().vocab_size
        return torch.randint(0, vocab, (batch, tokens), generator=generator).to(self.device)
