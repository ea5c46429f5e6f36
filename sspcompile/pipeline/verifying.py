"""`verify`: an artifact against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from sspcompile.checkpoint import Manifest, check_manifest
from sspcompile.compile.mask import load_mask
from sspcompile.errors import ArtifactError
from sspcompile.pipeline.compiling import Subject, open_subject
from sspcompile.slicing import modeling_sspcompile
from sspcompile.slicing.configuration import MODELING_FILE
from sspcompile.slicing.parity import Parity, compare, demand, repair_of
from sspcompile.slicing.plan import SlicePlan, make_plan
from sspcompile.slicing.repair import Repair, written_biases, written_down
from sspcompile.workspace import MASK, MODEL, PROBES

# Activations, the interpreters and what torch allocates beside the weights.
MEMORY_SLACK = 1.2
RANDOM_PROBE_LENGTHS = (1, 7, 32, 96)


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


@dataclass(frozen=True)
class Verified:
    """What `verify` found: `layerwise` says that the models were compared layer by layer."""

    manifest: Manifest
    parity: Parity
    layerwise: bool


def verify(
    folder: Path, model: str | None, progress: Callable[[str, int, int], None], *, layerwise: bool | None = None
) -> Verified:
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
    plan = make_plan(subject.checkpoint, mask)
    probes, repaired, down = _probes(folder, subject)
    if layerwise is None:
        layerwise = whole_bytes(plan) > psutil.virtual_memory().available
    if layerwise:
        from sspcompile.slicing.layerwise import compare_layerwise

        parity = compare_layerwise(
            subject.checkpoint, mask, written, probes, repaired=repaired, down=down, custom_code=custom,
            progress=lambda done, total: progress("proving", done, total),
        )
    else:
        progress("proving", 0, 1)
        repair = None
        if repaired:
            repair = Repair(
                repair_of(written, plan, mask).weights, written_biases(written, plan.geometry),
                written_down(written, plan.geometry) if down else {},
            )
        parity = compare(subject.load(), mask, repair, written, probes, custom_code=custom)
        progress("proving", 1, 1)
    demand(parity)
    return Verified(manifest, parity, layerwise)


def whole_bytes(plan: SlicePlan) -> int:
    """Memory that a comparison of whole models takes: both in fp32, and the larger one's file while it is read."""
    fp32 = 4 * (plan.dense.parameters + plan.sliced.parameters)
    return int(MEMORY_SLACK * (fp32 + plan.dense.weight_bytes))


def _probes(folder: Path, subject: Subject) -> tuple[list[list[int]], bool, bool]:
    """Token ids to compare on, whether o_proj was refitted, and down_proj: the artifact's own, or random ones after
    `slice`."""
    if (folder / PROBES).is_file():
        record = json.loads((folder / PROBES).read_text("utf-8"))
        return record["probes"], record["repaired"], record.get("down_refitted", False)
    rng = np.random.default_rng(0)
    vocab = subject.checkpoint.geometry.vocab
    return [rng.integers(0, vocab, size).tolist() for size in RANDOM_PROBE_LENGTHS], False, False
