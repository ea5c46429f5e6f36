"""`verify`: an artifact against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sspcompile.checkpoint import Manifest, check_manifest
from sspcompile.compile.mask import load_mask
from sspcompile.errors import ArtifactError
from sspcompile.pipeline.compiling import Subject, open_subject
from sspcompile.slicing import modeling_sspcompile
from sspcompile.slicing.configuration import MODELING_FILE
from sspcompile.slicing.parity import Parity, compare, demand, repair_of
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.repair import Repair, written_biases
from sspcompile.workspace import MASK, MODEL, PROBES


def dense_of(folder: Path, manifest: Manifest, model: str | None) -> Subject:
    """The dense model that an artifact was cut from: at `model`, or where the build found it. Raises ArtifactError."""
    source, place = (manifest.origin.get(key) for key in ("source", "source_name"))
    if not isinstance(source, str) or not isinstance(place, str):
        raise ArtifactError(f"The manifest of {folder} names no source.", hint="Run `sspcompile build` again.")
    subject = open_subject(model or place)
    if subject.fingerprint != source:
        raise ArtifactError(
            f"{subject.name} is not the model that {folder} was cut from.", hint="Name that model with --model."
        )
    return subject


def ships_code(model: Path) -> bool:
    """Whether a model folder needs code that it ships. Only our own code is ever run from an artifact.

    Raises ArtifactError for any other.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    if "auto_map" not in config:
        return False
    ours = Path(modeling_sspcompile.__file__).read_bytes()
    if not (model / MODELING_FILE).is_file() or (model / MODELING_FILE).read_bytes() != ours:
        raise ArtifactError(
            f"{model / MODELING_FILE} is not the file that this version of sspcompile ships; it is not run.",
            hint="Build the artifact again.",
        )
    return True


def verify(folder: Path, model: str | None, progress: Callable[[str, int, int], None]) -> tuple[Manifest, Parity]:
    """Check an artifact. Raises ArtifactError (a file or the source changed) or ParityError.

    `model` says where the dense model is now; None means where the build found it.
    """
    progress("checksums", 0, 1)
    manifest = check_manifest(folder)
    progress("checksums", 1, 1)
    subject = dense_of(folder, manifest, model)
    custom = ships_code(folder / MODEL)
    mask = load_mask(folder / MASK)
    plan = make_plan(subject.checkpoint, mask)
    record = json.loads((folder / PROBES).read_text("utf-8"))
    repair = None
    if record["repaired"]:
        weights = repair_of(folder / MODEL, plan, mask).weights
        repair = Repair(weights, written_biases(folder / MODEL, plan.geometry))
    progress("proving", 0, 1)
    parity = compare(
        subject.load(), mask, repair, folder / MODEL, record["probes"], custom_code=custom
    )
    demand(parity)
    progress("proving", 1, 1)
    return manifest, parity
