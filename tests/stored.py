"""The same tensors as other programs store them: other names, other places, the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]
PARTS = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def below(prefix: str) -> Callable[[Tensors], Tensors]:
    """Everything below a longer prefix, the head as well."""
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def decoder_as(prefix: str) -> Callable[[Tensors], Tensors]:
    """The decoder under another name; the head stays where it is."""
    return lambda tensors: {
        prefix + name.removeprefix("model.") if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }


def head_only(tensors: Tensors) -> Tensors:
    """Of a tied matrix only the head's name."""
    return {"lm_head.weight" if name == "model.embed_tokens.weight" else name: t for name, t in tensors.items()}


def stacked(family: str, module: str) -> Callable[[Tensors], Tensors]:
    """All experts of a layer in one tensor, as transformers 5 holds them in memory, below `module`."""
    own, (gate, up, down) = PARTS[family]

    def change(tensors: Tensors) -> Tensors:
        found = {
            name.replace(f".{own}.gate.", f".{module}.gate."): t
            for name, t in tensors.items()
            if ".experts." not in name
        }
        for layer in {name.partition(f".{own}.experts.")[0] for name in tensors if ".experts." in name}:

            def each(part: str, layer: str = layer) -> list[Tensor]:
                first = f"{layer}.{own}.experts."
                count = len({name for name in tensors if name.startswith(first) and name.endswith(f".{part}.weight")})
                return [tensors[f"{first}{number}.{part}.weight"] for number in range(count)]

            pairs = zip(each(gate), each(up), strict=True)
            found[f"{layer}.{module}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            found[f"{layer}.{module}.experts.down_proj"] = torch.stack(each(down))
        return found

    return change


def stored_as(source: Path, target: Path, change: Callable[[Tensors], Tensors], shards: int = 1) -> Path:
    """A copy of the model folder `source` with its tensors changed, in as many files."""
    shutil.copytree(source, target)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(source / "model.safetensors")).items()}
    if shards == 1:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target
    (target / "model.safetensors").unlink()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target
