"""`export`: a build, a cut or a plain checkpoint in the form that a runtime takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspcompile.api.arguments import Named, demand
from sspcompile.checkpoint import Manifest
from sspcompile.errors import InputError
from sspcompile.export.card import licence_of, onnx_card
from sspcompile.export.hf import export_hf
from sspcompile.export.onnx import Blocks, Exported, Precision, export_onnx
from sspcompile.model.dense import open_dense
from sspcompile.progress import Progress, silent
from sspcompile.proof.probes import random_probes
from sspcompile.workspace import PLAN, PROBES, REPORT


@dataclass(frozen=True)
class Source:
    """A model folder to export, and what is known of it. `report` and `plan` are an artifact's own files, or None."""

    model: Path
    origin: Mapping[str, Any]
    probes: list[list[int]]
    report: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    custom_code: bool = False


def source_of(found: Named) -> Source:
    """What an argument names, as something to export; a build's checksums are held against its files first.

    Raises ArtifactError, and InputError for what is an ONNX export already.
    """
    if found.onnx:
        raise InputError(f"{found.folder} is an ONNX export already.", hint="Name what it was exported from.")
    if found.kind == "build":
        return Source(
            model=found.model,
            origin={**found.manifest().origin, "artifact": found.name},
            probes=_read(found.folder / PROBES)["probes"],
            report=_read(found.folder / REPORT),
            plan=_read(found.folder / PLAN),
            custom_code=found.custom_code,
        )
    if found.kind == "model":
        dense = open_dense(str(found.folder))
        origin = {"source": dense.fingerprint, "source_name": dense.place, "licence": licence_of(found.model)}
    else:
        origin = {**found.manifest().origin, "artifact": found.name}
    vocab = int(_read(found.model / "config.json").get("vocab_size", 1))
    return Source(found.model, origin, random_probes(vocab), custom_code=found.custom_code)


def to_hf(
    found: Named, out: Path, *, host: str | None = None, overwrite: bool = False, progress: Progress = silent
) -> Manifest:
    """Publish a build's model folder. Raises InputError for anything else: it is such a folder as it is."""
    demand(found, "build", command="export --format hf")
    return export_hf(found.folder, out, host=host, overwrite=overwrite, progress=progress)


def to_onnx(
    source: Source,
    out: Path,
    precision: Precision,
    *,
    blocks: Blocks,
    positions: int | None = None,
    last_logits: bool = False,
    link: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write, run and publish. Raises what `export_onnx` raises."""
    return export_onnx(
        source.model,
        out,
        precision=precision,
        blocks=blocks,
        probes=source.probes,
        origin=source.origin,
        card=lambda agreement: onnx_card(
            source.origin,
            out.name,
            agreement,
            precision,
            last_logits=last_logits,
            report=source.report,
            plan=source.plan,
        ),
        trust_remote_code=source.custom_code,
        positions=positions,
        last_logits=last_logits,
        link=link,
        overwrite=overwrite,
        progress=progress,
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
