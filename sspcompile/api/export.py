"""`export`: a build, a cut or a plain checkpoint in the form that a runtime takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sspcompile.api.arguments import KINDS, ONE_SIZE, Named, demand
from sspcompile.checkpoint import Manifest
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.checkpoint.source import not_carried, tensor_table
from sspcompile.errors import InputError
from sspcompile.export.agreement import Agreement
from sspcompile.export.card import gguf_card, licence_of, onnx_card
from sspcompile.export.gguf.publish import GgufExport, export_gguf
from sspcompile.export.gguf.source import read_source
from sspcompile.export.hf import export_hf
from sspcompile.export.onnx import PRECISIONS, Blocks, Exported, Precision, export_onnx
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.onnx.weights import ROTARY_FILE
from sspcompile.export.refitted import Refit, read_refit
from sspcompile.model.blocks import GGUF_ROUNDINGS, OnnxRounding, Rounding
from sspcompile.model.dense import open_dense
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.progress import Progress, silent
from sspcompile.proof.probes import random_probes
from sspcompile.request.options import flag
from sspcompile.slicing.hosts import named_host
from sspcompile.workspace import PLAN, PROBES, REPORT, Workspace

FORMATS = ("hf", "onnx", "gguf")
ROUNDING_ONLY = ("block_size", "accuracy_level", "activations", "keep_embeddings")
ONNX_ONLY = ("precision", *ROUNDING_ONLY, "context_length", "last_logits", "hard_link")
GGUF_ONLY = ("type",)
OPTIONS_OF: Mapping[str, tuple[str, ...]] = {"hf": ("host",), "onnx": ONNX_ONLY, "gguf": GGUF_ONLY}


@dataclass(frozen=True)
class Source:
    """A model folder to export, and what is known of it. `report` and `plan` are an artifact's own files, or None, as
    is the folder of the `artifact` itself.
    """

    model: Path
    origin: Mapping[str, Any]
    probes: list[list[int]]
    report: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    custom_code: bool = False
    artifact: Path | None = None


def source_of(found: Named, *, vocab_of: Callable[[Path], int] | None = None) -> Source:
    """What an argument names, as something to export; a build's checksums are held against its files first.

    `vocab_of` reads the width of the logits where the model brings no texts; by default as the ONNX graph sees it.
    Raises ArtifactError, and InputError for what is an export for another runtime already.
    """
    if found.other_runtime is not None:
        raise InputError(f"{found.folder} is {found.other_runtime} already.", hint="Name what it was exported from.")
    if found.kind == "build":
        return Source(
            model=found.model,
            origin={**found.manifest().origin, "artifact": found.name},
            probes=read_json(found.folder / PROBES)["probes"],
            report=read_json(found.folder / REPORT),
            plan=read_json(found.folder / PLAN),
            custom_code=found.custom_code,
            artifact=found.folder,
        )
    if found.kind == "model":
        dense = open_dense(found.typed or str(found.folder))
        origin = {**dense.origin, "licence": licence_of(found.model), "left_out": not_carried(found.model)}
    else:
        origin = {**found.manifest().origin, "artifact": found.name}
    vocab = read_decoder(found.model).geometry.vocab if vocab_of is None else vocab_of(found.model)
    return Source(found.model, origin, random_probes(vocab), custom_code=found.custom_code)


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written. `host` is for hf, `type` for gguf, `size` (of a nested artifact) for all, the rest for
    ONNX; None and False leave a thing at its default.

    `context_length`: that of the graph. `hard_link`: share unchanged weight files with the source.
    """

    form: str = "hf"
    host: str | None = None
    precision: str | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    activations: str | None = None
    keep_embeddings: bool = False
    context_length: int | None = None
    last_logits: bool = False
    hard_link: bool = False
    type: str | None = None
    size: float | None = None

    def check(self) -> None:
        """Raises InputError for an unknown format, and for an option that belongs to another one."""
        if self.form not in FORMATS:
            raise InputError(f"There is no export format {self.form!r}.", hint=f"Accepted: {', '.join(FORMATS)}.")
        for form, options in OPTIONS_OF.items():
            given = next((name for name in options if getattr(self, name) not in (None, False)), None)
            if form != self.form and given is not None:
                raise InputError(
                    f"{flag(given)} belongs to --format {form}.", hint=f"Leave it out, or add --format {form}."
                )

    def rounding(self) -> tuple[Precision, Blocks]:
        """The numbers of an ONNX graph. Raises InputError for unknown ones, and for blocks where nothing is rounded."""
        name = self.precision if self.precision is not None else "fp32"
        if name not in PRECISIONS:
            raise InputError(f"There is no precision {name!r}.", hint=f"Accepted: {', '.join(PRECISIONS)}.")
        precision = PRECISIONS[name]
        if precision.bits is None:
            given = next((option for option in ROUNDING_ONLY if getattr(self, option) not in (None, False)), None)
            if given is not None:
                raise InputError(f"{flag(given)} is about rounded matrices.", hint="Add --precision int8 or int4.")
        elif self.activations == "fp16":
            precision = replace(precision, dtype="F16")
        blocks = Blocks(keep_embeddings=self.keep_embeddings)
        if self.block_size is not None:
            blocks = replace(blocks, size=self.block_size)
        if self.accuracy_level is not None:
            blocks = replace(blocks, accuracy_level=self.accuracy_level)
        return precision, blocks


@dataclass(frozen=True)
class Published:
    """A finished export: its folder, name -> bytes of its files, and how an ONNX graph or a GGUF agrees with
    transformers.

    `context_length`: the longest text of an ONNX graph in tokens, and `table_bytes` what its rotary tables take.
    `left_out`: files of a model folder that go with no export of it. `refit`: what the build refitted for a rounding,
    taken here or not.
    """

    folder: Path
    files: Mapping[str, int]
    precision: Precision | None = None
    agreement: Agreement | None = None
    context_length: int | None = None
    table_bytes: int | None = None
    left_out: Sequence[str] = ()
    gguf: GgufExport | None = None
    refit: Refit | None = None


def export(
    found: Named,
    request: ExportRequest,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    placement: Placement = ANYWHERE,
    reads: Sequence[Path] = (),
) -> Published:
    """Write what an argument names in the form that a runtime takes; by default to exported/NAME-FORMAT.

    `reads`: what was read to make `found`. Raises InputError for what cannot be asked for, OutputExistsError, and
    ParityError for an export that computes something else.
    """
    request.check()
    demand(found, *ONE_SIZE, command="export")
    if request.size is not None:
        raise InputError(f"--size chooses of a nested artifact, and {found.folder} is none.", hint="Leave it out.")
    if request.form == "hf":
        _demand_build(found)
        out = out or hf_folder(workspace, found.name)
        manifest = export_hf(found.folder, out, host=named_host(request.host), overwrite=overwrite, progress=progress)
        return Published(out, sizes_of(manifest))
    if request.form == "gguf":
        out = out or gguf_folder(workspace, found.name, request.type)
        refuse_existing(out, overwrite=overwrite, reads=(*found.reads, *reads))
        return _to_gguf(found, request, progress, out=out, overwrite=overwrite, placement=placement)
    precision, blocks = request.rounding()
    out = out or onnx_folder(workspace, found.name, precision.name)
    refuse_existing(out, overwrite=overwrite, reads=(*found.reads, *reads))
    source = source_of(found)
    refit = _refit_of(source, _rounding_in_onnx(precision, blocks))
    done = to_onnx(
        source,
        out,
        precision,
        blocks=blocks,
        refit=refit,
        positions=request.context_length,
        last_logits=request.last_logits,
        link=request.hard_link,
        overwrite=overwrite,
        progress=progress,
        placement=placement,
    )
    sizes = sizes_of(done.manifest)
    return Published(
        out,
        sizes,
        precision,
        done.agreement,
        done.context_length,
        table_bytes=sizes[ROTARY_FILE],
        left_out=source.origin.get("left_out", ()),
        refit=refit,
    )


def _demand_build(found: Named) -> None:
    """Raise InputError for what is a model folder already, or an export for another runtime."""
    if found.kind != "build" and found.other_runtime is None:
        raise InputError(
            f"{found.folder} is {KINDS[found.kind]}: transformers and vLLM load it as it is.",
            hint="Copy it, or name a build, or another --format.",
        )
    demand(found, "build", command="export --format hf")


def hf_folder(workspace: Workspace, name: str) -> Path:
    """Where the Hugging Face folder of what is called `name` goes by default."""
    return workspace.exported / f"{name}-hf"


def onnx_folder(workspace: Workspace, name: str, precision: str) -> Path:
    """Where an ONNX export of what is called `name` goes by default."""
    suffix = "" if precision == "fp32" else f"-{precision}"
    return workspace.exported / f"{name}-onnx{suffix}"


def gguf_folder(workspace: Workspace, name: str, kind: str | None) -> Path:
    """Where a GGUF export of what is called `name` goes by default."""
    return workspace.exported / f"{name}-gguf{f'-{kind.lower()}' if kind is not None else ''}"


def _rounding_in_onnx(precision: Precision, blocks: Blocks) -> Rounding | None:
    return None if precision.bits is None else OnnxRounding(precision.bits, blocks.size)


def _refit_of(source: Source, rounding: Rounding | None) -> Refit | None:
    """What a build refitted, as an export in a `rounding` takes it. Raises ArtifactError."""
    if source.artifact is None:
        return None
    return read_refit(source.artifact, rounding, tensor_table(source.model))


def _to_gguf(
    found: Named, request: ExportRequest, progress: Progress, *, out: Path, overwrite: bool, placement: Placement
) -> Published:
    source = source_of(found, vocab_of=lambda folder: read_source(folder).geometry.vocab)
    refit = _refit_of(source, GGUF_ROUNDINGS.get((request.type or "").lower()))
    manifest, done = export_gguf(
        source.model,
        out,
        kind=request.type,
        probes=source.probes,
        origin=source.origin,
        card=lambda done: gguf_card(source.origin, out.resolve().name, done, report=source.report, plan=source.plan),
        trust_remote_code=source.custom_code,
        refitted=refit.tensors if refit is not None else None,
        overwrite=overwrite,
        progress=progress,
        placement=replace(placement, device="cpu", dtype="float32", device_map=None),
    )
    return Published(out, sizes_of(manifest), left_out=source.origin.get("left_out", ()), gguf=done, refit=refit)


def sizes_of(manifest: Manifest) -> dict[str, int]:
    """Name -> bytes of every file."""
    return {name: entry["size"] for name, entry in manifest.files.items()}


def to_onnx(
    source: Source,
    out: Path,
    precision: Precision,
    *,
    blocks: Blocks,
    refit: Refit | None = None,
    positions: int | None = None,
    last_logits: bool = False,
    link: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    placement: Placement = ANYWHERE,
) -> Exported:
    """Write, run and publish; the matrices of a `refit` that is taken are rounded. Raises what `export_onnx` raises."""
    return export_onnx(
        source.model,
        out,
        precision=precision,
        blocks=blocks,
        probes=source.probes,
        origin=source.origin,
        card=lambda agreement, context_length: onnx_card(
            source.origin,
            out.resolve().name,
            agreement,
            precision,
            context_length=context_length,
            last_logits=last_logits,
            refitted=refit is not None and refit.taken,
            report=source.report,
            plan=source.plan,
        ),
        trust_remote_code=source.custom_code,
        positions=positions,
        last_logits=last_logits,
        link=link,
        refitted=refit.tensors if refit is not None else None,
        overwrite=overwrite,
        progress=progress,
        placement=replace(placement, device="cpu", dtype="float32", device_map=None),
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
