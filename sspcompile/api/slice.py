"""`slice`: a mask and a checkpoint become a smaller checkpoint. The one stage that needs neither torch nor a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import sspcompile
from sspcompile.api.reads import dense_reads
from sspcompile.checkpoint import Manifest, staged, write_manifest
from sspcompile.checkpoint.source import not_carried
from sspcompile.errors import ArtifactError, CheckpointError
from sspcompile.export.card import licence_of, slice_card
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.progress import Progress, adding, silent
from sspcompile.slicing.mask import HeadMask, dump_mask, load_mask
from sspcompile.slicing.measures import Serving
from sspcompile.slicing.plan import SlicePlan, make_plan, plan_json
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MASK, PLAN


@dataclass(frozen=True)
class Cut:
    """A mask that fits a checkpoint: everything that is known before a byte is written."""

    dense: DenseModel
    mask: HeadMask
    plan: SlicePlan
    mask_file: Path


def open_cut(model: str | None, mask: Path, *, host: str | None, any_model: bool = False, unnamed: bool = False) -> Cut:
    """Open headers and mask, and plan. Raises ArtifactError for a mask of another model, unless `any_model`, and for
    one that names no model, unless `unnamed` will do as well.

    The identity of a model is its configuration, tokenizer and weights, not its place, so a mask that was compiled on
    another machine fits a copy of its model.
    """
    dense = open_dense(model)
    read = load_mask(mask)
    plan = make_plan(dense.checkpoint, read, host=host)
    if any_model or read.model == dense.fingerprint or (unnamed and not read.model):
        return Cut(dense, read, plan, mask)
    if not read.model:
        raise ArtifactError(
            f"{mask} does not say which model it was compiled for.", hint="Give --any-model to use it nevertheless."
        )
    raise ArtifactError(
        f"{mask} was compiled for another model than {dense.checkpoint.path}.",
        hint="Name that model with --model, or give --any-model to use the mask nevertheless.",
    )


def write_cut(
    cut: Cut,
    out: Path,
    *,
    max_shard_bytes: int | None = None,
    link_unchanged: bool = False,
    checksums: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write the folder: model files, mask.json, plan.json, a card and a manifest. Whole or absent.

    `checksums` adds the sha256 of the weight files to the manifest, which reads them once more.
    """
    if not cut.dense.checkpoint.has_weights:
        raise CheckpointError(
            f"{cut.dense.checkpoint.path} holds a configuration without weights.",
            hint="`sspcompile plan` works without them.",
        )
    with staged(out, overwrite=overwrite, reads=(*dense_reads(cut.dense), cut.mask_file)) as folder:
        write_model(
            cut.dense.checkpoint,
            cut.plan,
            folder,
            max_shard_bytes=max_shard_bytes,
            link_unchanged=link_unchanged,
            progress=adding(progress, "cutting", cut.plan.sliced.weight_bytes),
        )
        plan = plan_json(cut.plan, _serving(cut.mask))
        (folder / MASK).write_text(dump_mask(cut.mask), "utf-8")
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", "utf-8")
        origin = {
            "sspcompile": sspcompile.__version__,
            **cut.dense.origin,
            "licence": licence_of(cut.dense.checkpoint.path),
            "left_out": not_carried(cut.dense.checkpoint.path),
            # How the build of the mask held its prompts out; masks of earlier versions, and of others, do not say.
            **{name: value for name, value in cut.mask.scenario.items() if name == "holding"},
        }
        (folder / "README.md").write_text(slice_card(plan, cut.mask, origin, out.name), "utf-8")
        return write_manifest(folder, origin, hash_weights=checksums)


def _serving(mask: HeadMask) -> Serving | None:
    """What the bound on memory or time counted for that the mask was compiled within."""
    asked = mask.memory_requested or mask.latency_requested
    return None if asked is None else Serving(context=asked["context"], batch=asked["batch"])
