"""`verify`: a build or a cut against its manifest, and its model against the masked dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sspcompile.api.arguments import Named, demand
from sspcompile.checkpoint import Manifest
from sspcompile.model.dense import DenseModel
from sspcompile.progress import Progress, silent
from sspcompile.proof.parity import Parity
from sspcompile.proof.probes import random_probes
from sspcompile.proof.prove import Claim, prove
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, PROBES


@dataclass(frozen=True)
class Verified:
    """What `verify` found: `layerwise` says that the models were compared layer by layer."""

    manifest: Manifest
    parity: Parity
    layerwise: bool


def verify(
    found: Named, model: str | None = None, progress: Progress = silent, *, layerwise: bool | None = None
) -> Verified:
    """Check a build, or a folder that `slice` wrote.

    Raises ArtifactError where a file or the source changed, and ParityError.

    `model` says where the dense model is now; None means where it was. `layerwise` None decides by the free memory.
    """
    demand(found, "build", "cut", command="verify")
    progress("checksums", 0, 1)
    manifest = found.manifest()
    progress("checksums", 1, 1)
    dense = found.dense(model)
    mask = load_mask(found.folder / MASK, empty_layers=True)
    probes, repaired, down = _probes(found.folder, dense)
    claim = Claim(dense.checkpoint, mask, found.model, found.custom_code, repaired, down)
    parity, by_layer = prove(claim, dense.load, probes, progress, layerwise=layerwise)
    return Verified(manifest, parity, by_layer)


def _probes(folder: Path, dense: DenseModel) -> tuple[list[list[int]], bool, bool]:
    """Token ids to compare on, whether o_proj was refitted, and down_proj: the artifact's own, or random ones after
    `slice`."""
    if (folder / PROBES).is_file():
        record = json.loads((folder / PROBES).read_text("utf-8"))
        return record["probes"], record["repaired"], record.get("down_refitted", False)
    return random_probes(dense.checkpoint.geometry.vocab), False, False
