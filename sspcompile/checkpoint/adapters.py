"""A LoRA adapter in place of a model: what it changes, and in which base. Told by its configuration and headers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.foreign import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    adapter_error,
    files_in,
    other_weights,
)
from sspcompile.checkpoint.headers import FLOATS, TensorInfo, read_header
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import INDEX_NAME, Checkpoint
from sspcompile.checkpoint.tensors import EMBEDDING
from sspcompile.errors import CheckpointError, UnsupportedModelError

# What peft calls the parts of one layer: [r, in] and [out, r].
PART = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
# What decides the numbers of a plain adapter, and what decides nothing once it was trained. Any other setting that is
# on is of another method, or of one that is not known here.
DECIDES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
DECIDES_NOTHING = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "init_lora_weights", "bias"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
)
# Starts that leave the base as it is. Others take a part of it away, which is not written down.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
MERGE_ELSEWHERE = "Merge it with peft's merge_and_unload(), save the result with save_pretrained(), and cut that."


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter of linear layers. `typed`: what the user called it. `settings`: its configuration."""

    folder: Path
    typed: str
    settings: Mapping[str, Any]

    @property
    def base(self) -> str:
        """What it was trained on, as `find` takes it. Raises CheckpointError where it does not say."""
        name, revision = self.settings.get("base_model_name_or_path"), self.settings.get("revision")
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{self.typed} does not say which model it is an adapter of.",
                hint=f"Set base_model_name_or_path in its {ADAPTER_CONFIG} to a folder or a hub name.",
            )
        at_hub = isinstance(revision, str) and revision and "@" not in name and not Path(name).expanduser().exists()
        return f"{name}@{revision}" if at_hub else name

    @cached_property
    def layers(self) -> Mapping[str, tuple[TensorInfo, TensorInfo]]:
        """Name of a linear layer -> A [r, in] and B [out, r]. Raises UnsupportedModelError for other parts."""
        table = read_header(self.folder / ADAPTER_WEIGHTS)
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, info in table.items():
            found = PART.fullmatch(name)
            if found is None:
                raise self._beyond(f"holds {name}")
            parts.setdefault(found["layer"], {})[found["part"]] = info
        for layer, pair in parts.items():
            shapes = [pair[part].shape for part in "AB" if part in pair]
            if len(shapes) < 2 or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
                raise CheckpointError(
                    f"{self.typed} has no A and B that fit each other for {layer}.", hint="Download it again."
                )
            if any(info.dtype not in FLOATS for info in pair.values()):
                raise self._beyond(f"stores {layer} as {pair['A'].dtype}")
        if not parts:
            raise CheckpointError(f"{self.typed} holds no tensors.", hint="Download it again.")
        return {layer: (pair["A"], pair["B"]) for layer, pair in sorted(parts.items())}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what decides its numbers and its weights; hex digits. Where its base lies does not enter."""
        said = {name: self.settings.get(name) for name in DECIDES}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        with (self.folder / ADAPTER_WEIGHTS).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def changed(self, base: Checkpoint) -> Mapping[str, tuple[TensorInfo, TensorInfo]]:
        """Name of a weight of `base` -> A and B. Raises CheckpointError for an adapter of another model."""
        tensors = base.tensors
        for layer, (a, b) in self.layers.items():
            name = f"{layer}.weight"
            if name not in tensors or name == EMBEDDING:
                raise CheckpointError(
                    f"{self.typed} changes {layer}, which is not a linear layer of {self.base}.",
                    hint=f"Name the model that it was trained on in its {ADAPTER_CONFIG}, or: {MERGE_ELSEWHERE}",
                )
            if tensors[name].shape != (b.shape[0], a.shape[1]):
                raise CheckpointError(
                    f"{self.typed} changes {layer} as a matrix of {[b.shape[0], a.shape[1]]}; in {self.base} it has "
                    f"{list(tensors[name].shape)}.",
                    hint=f"Name the model that it was trained on in its {ADAPTER_CONFIG}.",
                )
        return {f"{layer}.weight": pair for layer, pair in self.layers.items()}

    def check(self) -> None:
        """Raise UnsupportedModelError for what is not plain LoRA, as far as its configuration says so."""
        if self.settings.get("peft_type") != "LORA":
            raise adapter_error(self.folder, self.typed)
        for problem in self._beyond_plain():
            raise self._beyond(problem)

    def _beyond_plain(self) -> Iterator[str]:
        said = self.settings
        if saved := said.get("modules_to_save"):
            named = ", ".join(map(str, saved)) if isinstance(saved, list) else saved
            yield f"replaces whole layers (modules_to_save: {named})"
        if said.get("bias") not in (None, "none"):
            yield f"changes biases (bias: {said['bias']})"
        if said.get("init_lora_weights") not in PLAIN_STARTS:
            yield f"was started from a part of the base (init_lora_weights: {said['init_lora_weights']})"
        for name in sorted(set(said) - {*DECIDES, *DECIDES_NOTHING, "modules_to_save"}):
            if said[name]:
                yield f"sets {name}"

    def _beyond(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.typed} is not a plain LoRA adapter of linear layers: it {problem:.120}.", hint=MERGE_ELSEWHERE
        )


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter that can be told from its configuration, and no whole weights beside it."""
    names = files_in(folder)
    whole = [name for name in names if name not in ADAPTER_FILES]
    return ADAPTER_CONFIG in names and INDEX_NAME not in names and other_weights(whole) is None


def read_adapter(folder: Path, typed: str) -> Adapter:
    """The adapter in a folder, which the user called `typed`. Raises CheckpointError or UnsupportedModelError."""
    adapter = Adapter(folder, typed, read_json(folder / ADAPTER_CONFIG))
    adapter.check()
    return adapter


def demand_weights(adapter: Adapter) -> Adapter:
    """The same, if its weights are there in a form that is read. Raises CheckpointError."""
    names = files_in(adapter.folder)
    if ADAPTER_WEIGHTS in names:
        return adapter
    holds = "pickled weights, which are never opened" if "adapter_model.bin" in names else "no weights"
    raise CheckpointError(
        f"{adapter.typed} is a LoRA adapter of {adapter.base} and holds {holds}.",
        hint=f"Expected {ADAPTER_WEIGHTS}, which peft's save_pretrained() writes.",
    )
