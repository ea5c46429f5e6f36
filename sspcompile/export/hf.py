"""The Hugging Face folder: the artifact's own model files, a model card, a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sspcompile.checkpoint import Checkpoint, Manifest, check_manifest, staged, write_manifest
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.errors import InputError
from sspcompile.export.card import model_card
from sspcompile.progress import Progress, silent
from sspcompile.slicing.mask import whole_mask
from sspcompile.slicing.plan import make_plan, plan_json
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MODEL, PLAN, PROBES, REPORT


def export_hf(
    artifact: Path, out: Path, *, host: str | None = None, overwrite: bool = False, progress: Progress = silent
) -> Manifest:
    """Publish the model of an artifact as a folder that transformers and vLLM read.

    With `host` the stock class of that family loads it: the same tensors under another configuration, and zeros where
    that class has biases that the model lacks. That it computes the same is proven on the artifact's own probes.

    The artifact's checksums are checked first. Raises ArtifactError, OutputExistsError, ParityError, and InputError
    for an `out` that is, holds or lies in the artifact, or a host that cannot hold the model.
    """
    refuse_existing(out, overwrite=overwrite, reads=(artifact,))
    manifest = check_manifest(artifact)
    plan = _read(artifact / PLAN)
    if host is not None and plan["custom_code"]:
        raise InputError(
            "--host is for uniform cuts; head counts that differ by layer need the class in the folder.",
            hint="Leave --host out, or build with --layout uniform.",
        )
    with staged(out, overwrite=overwrite, reads=(artifact,)) as folder:
        if host is None:
            shutil.copytree(artifact / MODEL, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
        else:
            plan |= _write_hosted(artifact, folder, host, progress)
        card = model_card(_read(artifact / REPORT), plan, dict(manifest.origin), out.resolve().name)
        (folder / "README.md").write_text(card, "utf-8")
        return write_manifest(folder, {**manifest.origin, "artifact": artifact.resolve().name, "format": "hf"})


def _write_hosted(artifact: Path, folder: Path, host: str, progress: Progress) -> dict[str, Any]:
    """Write the model for the class of `host` and prove it; returns what changes in the plan."""
    from sspcompile.proof.claim import Claim
    from sspcompile.proof.prove import prove

    checkpoint = Checkpoint(artifact / MODEL)
    g = checkpoint.geometry
    mask = whole_mask(g.layers, g.heads, g.kv_heads)
    plan = make_plan(checkpoint, mask, host=host)
    write_model(checkpoint, plan, folder)
    probes = _read(artifact / PROBES)["probes"]
    prove(Claim(checkpoint, mask, folder, custom_code=False), probes, progress)
    hosted = plan_json(plan)
    return {"host": hosted["host"], "runtimes": hosted["runtimes"]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
