"""`verify`: an artifact against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspcompile.checkpoint import Manifest, check_manifest
from sspcompile.errors import ArtifactError
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.progress import Progress
from sspcompile.proof.claim import Claim, any_refitted
from sspcompile.proof.parity import Parity
from sspcompile.proof.prove import prove
from sspcompile.slicing.configuration import ships_code
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, MODEL, PROBES

RANDOM_PROBE_LENGTHS = (1, 7, 32, 96)


def dense_of(folder: Path, manifest: Manifest, model: str | None) -> DenseModel:
    """The dense model that an artifact was cut from: at `model`, or where the build found it. Raises ArtifactError."""
    source, place = (manifest.origin.get(key) for key in ("source", "source_name"))
    if not isinstance(source, str) or not isinstance(place, str):
        raise ArtifactError(f"The manifest of {folder} names no source.", hint="Run `sspcompile build` again.")
    subject = open_dense(model or place)
    if subject.fingerprint != source:
        raise ArtifactError(
            f"{subject.name} is not the model that {folder} was cut from.", hint="Name that model with --model."
        )
    return subject


@dataclass(frozen=True)
class Verified:
    """What `verify` found."""

    manifest: Manifest
    parity: Parity


def verify(folder: Path, model: str | None, progress: Progress, *, layerwise: bool | None = None) -> Verified:
    """Check an artifact, or a folder that `slice` wrote. Raises ArtifactError (a file or the source changed) or
    ParityError.

    `model` says where the dense model is now; None means where the build found it. `layerwise` None decides by the
    memory that is free.
    """
    progress("checksums", 0, 1)
    manifest = check_manifest(folder)
    progress("checksums", 1, 1)
    subject = dense_of(folder, manifest, model)
    written = folder / MODEL if (folder / MODEL).is_dir() else folder
    custom = ships_code(written)
    mask = load_mask(folder / MASK, empty_layers=True)
    probes, refitted = _probes(folder, subject)
    claim = Claim(subject.checkpoint, mask, written, custom, refitted)
    return Verified(manifest, prove(claim, probes, progress, layerwise=layerwise))


def _probes(folder: Path, subject: DenseModel) -> tuple[list[list[int]], dict[str, None]]:
    """Token ids to compare on, and the tensors that a repair computed: the artifact's own, or after `slice` random
    ones and none."""
    g = subject.checkpoint.geometry
    if (folder / PROBES).is_file():
        record = json.loads((folder / PROBES).read_text("utf-8"))
        if "refitted" in record:
            return record["probes"], dict.fromkeys(record["refitted"])
        # Earlier versions wrote down only that there was a repair.
        refitted = any_refitted(g, down=record.get("down_refitted", False)) if record["repaired"] else {}
        return record["probes"], refitted
    rng = np.random.default_rng(0)
    return [rng.integers(0, g.vocab, size).tolist() for size in RANDOM_PROBE_LENGTHS], {}
