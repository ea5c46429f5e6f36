"""`verify`: an artifact against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sspcompile.checkpoint import Manifest, check_manifest
from sspcompile.compile.mask import load_mask
from sspcompile.errors import ArtifactError
from sspcompile.pipeline import open_subject
from sspcompile.slicing.parity import Parity, compare, demand, repair_of
from sspcompile.slicing.plan import make_plan
from sspcompile.workspace import MASK, MODEL, PROBES


def verify(folder: Path, model: str | None, progress: Callable[[str, int, int], None]) -> tuple[Manifest, Parity]:
    """Check an artifact. Raises ArtifactError (a file or the source changed) or ParityError.

    `model` says where the dense model is now; None means where the build found it.
    """
    progress("checksums", 0, 1)
    manifest = check_manifest(folder)
    progress("checksums", 1, 1)
    name = model or manifest.origin["source_name"]
    subject = open_subject(None if name == "embedded" else name)
    if subject.fingerprint != manifest.origin["source"]:
        raise ArtifactError(
            f"{subject.name} is not the model that {folder} was cut from.", hint="Name that model with --model."
        )
    mask = load_mask(folder / MASK)
    plan = make_plan(subject.checkpoint, mask)
    probes = json.loads((folder / PROBES).read_text("utf-8"))
    repair = repair_of(folder / MODEL, plan, mask) if probes["repaired"] else None
    progress("proving", 0, 1)
    parity = compare(
        subject.load(), mask, repair, folder / MODEL, probes["prompts"], custom_code=plan.custom_code
    )
    demand(parity)
    progress("proving", 1, 1)
    return manifest, parity
