"""The Hugging Face folder: the artifact's own model files, a model card, a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sspcompile.checkpoint import Manifest, check_manifest, staged, write_manifest
from sspcompile.errors import InputError
from sspcompile.export.card import model_card
from sspcompile.workspace import MODEL, PLAN, REPORT


def export_hf(artifact: Path, out: Path, *, overwrite: bool = False) -> Manifest:
    """Publish the model of an artifact as a folder that transformers and vLLM read.

    The artifact's checksums are checked first. Raises ArtifactError, OutputExistsError, and InputError for an `out`
    inside the artifact.
    """
    if out.resolve().is_relative_to(artifact.resolve()):
        raise InputError(f"{out} lies inside the artifact.", hint="Give an --out outside of it.")
    manifest = check_manifest(artifact)
    with staged(out, overwrite=overwrite) as folder:
        for path in sorted((artifact / MODEL).iterdir()):
            shutil.copyfile(path, folder / path.name)
        card = model_card(_read(artifact / REPORT), _read(artifact / PLAN), dict(manifest.origin), out.name)
        (folder / "README.md").write_text(card, "utf-8")
        return write_manifest(folder, {**manifest.origin, "artifact": artifact.name, "format": "hf"})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
