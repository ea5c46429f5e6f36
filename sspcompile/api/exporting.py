"""`export`: an artifact, or a plain checkpoint, in the form that a runtime takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint import check_manifest, locate
from sspcompile.checkpoint.locate import EMBEDDED
from sspcompile.checkpoint.source import not_carried
from sspcompile.export.card import licence_of, onnx_card
from sspcompile.export.onnx import Blocks, Exported, Precision, export_onnx
from sspcompile.progress import Progress, silent
from sspcompile.slicing.configuration import MODELING_FILE, ships_code
from sspcompile.workspace import MODEL, PLAN, PROBES, REPORT

RANDOM_PROBE_LENGTHS = (1, 7, 32, 96)


@dataclass(frozen=True)
class Source:
    """A model folder to export, and what is known of it. `report` and `plan` are an artifact's own files, or None."""

    model: Path
    origin: Mapping[str, Any]
    probes: list[list[int]]
    report: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    custom_code: bool = False


def of_artifact(artifact: Path) -> Source:
    """The model of an artifact, its checksums checked. Raises ArtifactError."""
    manifest = check_manifest(artifact)
    return Source(
        model=artifact / MODEL,
        origin={**manifest.origin, "artifact": artifact.name},
        probes=_read(artifact / PROBES)["probes"],
        report=_read(artifact / REPORT),
        plan=_read(artifact / PLAN),
        custom_code=ships_code(artifact / MODEL),
    )


def of_checkpoint(model: str) -> Source:
    """A checkpoint as it is: a folder, a hub name or `embedded`. Raises CheckpointError."""
    path = locate(None if model == EMBEDDED else model)
    vocab = int(_read(path / "config.json").get("vocab_size", 1))
    rng = np.random.default_rng(0)
    probes = [rng.integers(0, vocab, length).tolist() for length in RANDOM_PROBE_LENGTHS]
    ours = (path / MODELING_FILE).is_file() and ships_code(path)
    origin = {"source_name": model, "licence": licence_of(path), "left_out": not_carried(path)}
    return Source(model=path, origin=origin, probes=probes, custom_code=ours)


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
