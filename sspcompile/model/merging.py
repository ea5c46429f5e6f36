"""A LoRA adapter and its base become one checkpoint in plain weights, matrix by matrix, computed by peft.

Every tensor that the adapter does not change keeps its bytes. The base is never in memory as a whole.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspcompile.checkpoint import Checkpoint, OutputTensor, copy_companions, fingerprint, write_checkpoint
from sspcompile.checkpoint.adapters import DECIDES, MERGE_ELSEWHERE, Adapter
from sspcompile.checkpoint.companions import of_tokenizer
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.locate import Found, find
from sspcompile.checkpoint.publish import temporary
from sspcompile.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sspcompile")

ONLY = "default"
README = "README.md"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# (adapter, base) -> the folder of both, for as long as the process lives.
_MERGED: dict[tuple[str, str], Path] = {}
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Merged:
    """A checkpoint that was merged for this process. `origin`: what a manifest says of where it came from."""

    checkpoint: Checkpoint
    origin: dict[str, Any]


def base_of(adapter: Adapter) -> tuple[Found, Checkpoint]:
    """The model that an adapter was trained on. Raises CheckpointError where it is not to be had."""
    try:
        found = find(adapter.base)
        base = Checkpoint(found.folder) if not found.adapter else None
    except InputError as error:
        raise CheckpointError(
            f"{adapter.typed} is a LoRA adapter of {adapter.base}, which cannot be used: {error.message}",
            hint="Download that model, or set base_model_name_or_path in adapter_config.json to where it is.",
        ) from error
    if base is None:
        raise CheckpointError(
            f"{adapter.typed} is an adapter of {adapter.base}, which is an adapter itself.", hint=MERGE_ELSEWHERE
        )
    return found, base


def merged(adapter: Adapter) -> Merged:
    """The adapter and its base as one checkpoint, in a temporary folder that goes with the process.

    A line of the log says what is merged. Raises InputError without peft, CheckpointError for a base that is not to be
    had or not the one, and UnsupportedModelError for an adapter that is not plain LoRA.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{adapter.typed} is a LoRA adapter of {adapter.base}, and peft, which merges it, is not installed.",
            hint=f"pip install 'sspcompile[peft]'; or, where peft is: {MERGE_ELSEWHERE}",
        )
    found, base = base_of(adapter)
    adapter.changed(base)
    version, base_fingerprint = metadata.version("peft"), fingerprint(base)
    origin = {
        "adapter": {
            "fingerprint": adapter.fingerprint,
            "base": base_fingerprint,
            "base_name": found.place,
            **({"base_revision": found.revision} if found.revision is not None else {}),
            "peft": version,
        }
    }
    key = (adapter.fingerprint, base_fingerprint)
    if key not in _MERGED or not _MERGED[key].is_dir():
        log.info(
            f"Merging the LoRA adapter {adapter.typed} ({adapter.fingerprint[:12]}) into {adapter.base} "
            f"({base_fingerprint[:12]}), {len(adapter.layers)} matrices, with peft {version}"
        )
        folder = temporary("sspcompile-merged")
        _write(folder, adapter, base)
        _MERGED[key] = folder
    return Merged(Checkpoint(_MERGED[key]), origin)


def _write(folder: Path, adapter: Adapter, base: Checkpoint) -> None:
    changed = adapter.changed(base)
    tensors = []
    for name, info in base.tensors.items():
        content: Callable[[], Iterable[Any]] = partial(_extents, info)
        whole = info.extent if base.stored.get(name) == info else None
        if name in changed:
            content, whole = partial(_merge, adapter, name, info, *changed[name]), None
        tensors.append(OutputTensor(name, info.dtype, info.shape, content, unchanged=whole, shard=info.file.name))
    # What is only read may be a second name of the base's files.
    write_checkpoint(folder, tensors, link_unchanged=True)
    (folder / "config.json").write_text(json.dumps(base.carried_config, indent=2, sort_keys=True) + "\n", "utf-8")
    copied = copy_companions(base.path, folder)
    if any((adapter.folder / name).is_file() for name in TOKENIZERS):
        # A tokenizer that was saved with the adapter is the one that it was trained with; it goes as a whole.
        for name in filter(of_tokenizer, copied):
            (folder / name).unlink()
        copy_companions(adapter.folder, folder, wanted=of_tokenizer)
    if (base.path / README).is_file():  # names the licence
        shutil.copyfile(base.path / README, folder / README)


def _extents(info: TensorInfo) -> Iterable[Any]:
    return [info.extent]


def _merge(adapter: Adapter, name: str, info: TensorInfo, a: TensorInfo, b: TensorInfo) -> Iterable[Any]:
    """The bytes of one merged matrix: W + scaling * B A, as peft adds and rounds it."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from sspcompile.model.stored import read_tensor

    weight = read_tensor(info)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    said = {key: adapter.settings[key] for key in DECIDES if adapter.settings.get(key) is not None}
    layer = name.removesuffix(".weight")
    try:
        # peft draws a start for A, which is replaced; nobody else's random numbers change by it. It warns of patterns
        # that are about other layers. Both are the process's, and several shards are written at once.
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**said, target_modules=[layer])
            model = inject_adapter_in_model(config, _below(layer, linear), adapter_name=ONLY)
        lora: Any = model.get_submodule(layer)
        # As peft holds an adapter: never in fewer bits than these.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for part, found in ((lora.lora_A[ONLY], a), (lora.lora_B[ONLY], b)):
            if part.weight.shape != found.shape:
                raise ValueError(
                    f"{layer} has the rank {a.shape[0]}, its configuration says {len(lora.lora_A[ONLY].weight)}"
                )
            part.weight = torch.nn.Parameter(read_tensor(found).to(dtype), requires_grad=False)
        # merge_and_unload() does no other: peft's safe merge rounds twice.
        lora.merge()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, re.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"peft cannot merge {adapter.typed}: {reason.rstrip('.')}.", hint="Check the adapter."
        ) from error
    result = lora.get_base_layer().weight.detach()
    if not torch.isfinite(result).all():
        raise CheckpointError(
            f"{adapter.typed} makes {layer} infinite or not a number in {info.dtype}.", hint="Check the adapter."
        )
    return [memoryview(result.contiguous().view(torch.uint8).numpy().reshape(-1)).cast("B")]


def _below(layer: str, linear: torch.nn.Module) -> torch.nn.Module:
    """A model with nothing in it but one layer, at its own name."""
    from torch import nn

    root = parent = nn.Module()
    *path, last = layer.split(".")
    for part in path:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, linear)
    return root
