"""`verify`: a build or a cut against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sspcompile.api.arguments import Named, demand
from sspcompile.api.nested import verify_nested
from sspcompile.checkpoint import Manifest
from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.progress import Progress, silent
from sspcompile.proof.claim import Claim, any_refitted
from sspcompile.proof.parity import Parity
from sspcompile.proof.probes import random_probes
from sspcompile.proof.prove import prove
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, PROBES


@dataclass(frozen=True)
class Verified:
    """What `verify` found."""

    manifest: Manifest
    parity: Parity


def verify(
    found: Named,
    model: str | None = None,
    progress: Progress = silent,
    *,
    layerwise: bool | None = None,
    placement: Placement = ANYWHERE,
) -> Verified:
    """Check a build, a folder that `slice` wrote, or the whole model of a nested artifact.

    Raises ArtifactError where a file or the source changed, and ParityError.

    `model` says where the dense model is now; None means where it was. `layerwise` None decides by the free memory.
    """
    demand(found, "build", "cut", "nested", command="verify")
    progress("checksums", 0, 1)
    manifest = found.manifest()
    progress("checksums", 1, 1)
    dense = found.dense(model)
    if found.kind == "nested":
        parity = verify_nested(found.folder, dense, progress, layerwise=layerwise, placement=placement)
        return Verified(manifest, parity)
    mask = load_mask(found.folder / MASK)
    probes, refitted = _probes(found.folder, dense)
    claim = Claim(dense.checkpoint, mask, found.model, found.custom_code, refitted)
    return Verified(manifest, prove(claim, probes, progress, layerwise=layerwise, placement=placement))


def _probes(folder: Path, dense: DenseModel) -> tuple[list[list[int]], dict[str, None]]:
    """Token ids to compare on, and the tensors that a repair computed: the artifact's own, or after `slice` random
    ones and none."""
    geometry = dense.checkpoint.geometry
    if not (folder / PROBES).is_file():
        return random_probes(geometry.vocab), {}
    record = json.loads((folder / PROBES).read_text("utf-8"))
    if "refitted" in record:
        return record["probes"], dict.fromkeys(record["refitted"])
    # Earlier versions wrote down only that there was a repair.
    refitted = any_refitted(geometry, down=record.get("down_refitted", False)) if record["repaired"] else {}
    return record["probes"], refitted
