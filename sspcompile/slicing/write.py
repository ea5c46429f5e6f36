"""One call from plan to a Hugging Face folder on disk (inside a staged folder; publication is the caller's)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sspcompile.checkpoint import Checkpoint, copy_companions, write_checkpoint
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.references import drop_references
from sspcompile.checkpoint.tokenizers import name_class
from sspcompile.slicing.configuration import MODELING_FILE, sliced_config
from sspcompile.slicing.cut import cut_tensors
from sspcompile.slicing.plan import SlicePlan


def write_model(
    checkpoint: Checkpoint,
    plan: SlicePlan,
    folder: Path,
    *,
    replaced: Mapping[str, np.ndarray] | None = None,
    max_shard_bytes: int | None = None,
    link_unchanged: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write weights, config.json, tokenizer files and, for a per-layer cut, the class that loads it.

    Shards are those of the source unless `max_shard_bytes` says otherwise. No model is built and torch is not needed.
    """
    companions(checkpoint.path)  # refuses what could not be copied before weights are written
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        folder,
        cut_tensors(checkpoint, plan, replaced=replaced),
        max_shard_bytes=max_shard_bytes,
        link_unchanged=link_unchanged,
        progress=progress,
    )
    config = sliced_config(checkpoint.carried_config, plan)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    copy_companions(checkpoint.path, folder)
    drop_references(folder)
    own = checkpoint.geometry.family
    if plan.host is not own and own.tokenizer and not plan.host.tokenizer:
        name_class(folder, own.tokenizer)
    if plan.custom_code:
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
