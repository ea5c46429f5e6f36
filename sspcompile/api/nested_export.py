"""`export` of whatever an argument names: a nested artifact as a whole or one of its sizes, anything else as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sspcompile.api.arguments import Named
from sspcompile.api.export import ExportRequest, Published, export, hf_folder, onnx_folder, read_json, sizes_of
from sspcompile.api.members import MemberCut, cut_member, open_member
from sspcompile.checkpoint.publish import scratch
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.errors import InputError
from sspcompile.export.card import onnx_card
from sspcompile.export.onnx.sizes import export_sizes
from sspcompile.export.onnx.weights import ROTARY_FILE
from sspcompile.export.onnx.write import EXACT
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.progress import Progress, silent
from sspcompile.slicing.hosts import named_host
from sspcompile.workspace import PROBES, Workspace


def export_any(
    found: Named,
    request: ExportRequest,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    placement: Placement = ANYWHERE,
) -> Published:
    """As `export`. Of a nested artifact: the member of `request.size` in any form, or all sizes for ONNX Runtime.

    Raises what `export` and `open_member` raise, and InputError for a form that holds one size where none is named.
    """
    if found.kind != "nested":
        return export(found, request, workspace, progress, out=out, overwrite=overwrite, placement=placement)
    request.check()
    if request.size is None:
        return _all_sizes(found, request, workspace, progress, out, overwrite=overwrite, placement=placement)
    cut = open_member(found.folder, request.size, host=named_host(request.host))
    name = f"{found.name}-{cut.member.share:g}"
    if request.form == "hf":
        return _member(cut, out or hf_folder(workspace, name), progress, overwrite=overwrite)
    with scratch(workspace.exported, "member") as place:
        cut_member(cut, place / name)
        one = Named("cut", place / name, place / name)
        alone = replace(request, size=None)
        return export(
            one, alone, workspace, progress, out=out, overwrite=overwrite, placement=placement, reads=found.reads
        )


def _member(cut: MemberCut, out: Path, progress: Progress, *, overwrite: bool) -> Published:
    """A member as `slice --from` writes it is what transformers loads."""
    manifest = cut_member(cut, out, overwrite=overwrite, progress=progress)
    return Published(out, sizes_of(manifest))


def _all_sizes(
    found: Named,
    request: ExportRequest,
    workspace: Workspace,
    progress: Progress,
    out: Path | None,
    *,
    overwrite: bool,
    placement: Placement,
) -> Published:
    _demand_all_sizes(found, request)
    out = out or onnx_folder(workspace, found.name, EXACT.name)
    refuse_existing(out, overwrite=overwrite, reads=found.reads)
    origin = {**found.manifest().origin, "artifact": found.name}
    done = export_sizes(
        found.folder,
        out,
        probes=read_json(found.folder / PROBES)["probes"],
        origin=origin,
        card=lambda agreement, context_length: onnx_card(
            origin,
            out.resolve().name,
            agreement,
            EXACT,
            context_length=context_length,
            last_logits=request.last_logits,
            report=None,
            plan=None,
            sizes=tuple(origin["nested"]),
        ),
        positions=request.context_length,
        last_logits=request.last_logits,
        overwrite=overwrite,
        progress=progress,
        placement=replace(placement, device="cpu", dtype="float32", device_map=None),
    )
    files = sizes_of(done.manifest)
    furthest = max(done.agreements.values(), key=lambda one: one.relative)
    return Published(out, files, EXACT, furthest, done.context_length, table_bytes=files[ROTARY_FILE])


def _demand_all_sizes(found: Named, request: ExportRequest) -> None:
    """Raise InputError for what only one size can be."""
    cut = f"`sspcompile slice --from {found.folder} --size 0.8 --out DIR`"
    if request.form != "onnx":
        raise InputError(
            f"{found.folder} holds several sizes, and --format {request.form} takes one.",
            hint=f"Give --size 0.8, or {cut}; --format onnx takes all.",
        )
    if request.precision not in (None, EXACT.name) or request.hard_link:
        asked = "--hard-link" if request.hard_link else f"--precision {request.precision}"
        raise InputError(
            f"All sizes in one export are in {EXACT.name} and in a file of their own, without {asked}.",
            hint=f"Leave it out, or give --size 0.8 for one of them, or {cut}.",
        )
