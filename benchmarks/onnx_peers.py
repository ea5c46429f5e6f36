"""What others make of a model folder: python -P benchmarks/onnx_peers.py dynamo|optimum FOLDER OUT.

`dynamo`: torch.onnx.export of the transformers model with its cache as inputs and outputs. `optimum`: optimum-onnx's
own export; run it with the Python of an environment that has it. Prints JSON: seconds, peak resident bytes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def dynamo(folder: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from sspcompile.model.cache import cache_argument, cache_of

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    g = model.config
    sides = [f"{layer}.{part}" for layer in range(g.num_hidden_layers) for part in ("key", "value")]

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache()
            for layer in range(g.num_hidden_layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.inner(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **{cache_argument(model): cache}
            )
            return output.logits, *(side for one in cache_of(output).layers for side in (one.keys, one.values))

    auto = torch.export.Dim.AUTO
    past = [torch.zeros(2, g.num_key_value_heads, 5, g.head_dim) for _ in sides]
    program = torch.onnx.export(
        WithCache(),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), *past),
        dynamo=True,
        dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}, tuple({0: auto, 2: auto} for _ in past)),
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{side}" for side in sides)],
        output_names=["logits", *(f"present.{side}" for side in sides)],
        verbose=False,
    )
    out.mkdir(parents=True)
    if program is None:  # as without dynamo
        raise RuntimeError("torch gave no program")
    program.save(out / "model.onnx", external_data=True)


def optimum(folder: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(folder), str(out), task="text-generation-with-past", do_validation=False, no_post_process=True)


def main(kind: str, folder: str, out: str) -> None:
    start = time.perf_counter()
    {"dynamo": dynamo, "optimum": optimum}[kind](Path(folder), Path(out))
    took = time.perf_counter() - start
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps([took, peak]))


if __name__ == "__main__":
    main(*sys.argv[1:])
