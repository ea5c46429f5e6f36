"""`build --nested`, and `verify` of what it writes: one artifact for several sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sspcompile
from sspcompile.api.reads import dense_reads, pool_reads
from sspcompile.api.refusing import refuse_hopeless
from sspcompile.api.unfinished import passes_folder, remove_old
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.checkpoint.publish import scratch
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.checkpoint.source import not_carried
from sspcompile.export.card import CARD, licence_of, nested_card
from sspcompile.model.chat import rendering_of
from sspcompile.model.dense import DenseModel
from sspcompile.model.journal import claimed, keeping
from sspcompile.model.placement import ANYWHERE, Placement, release, resolve
from sspcompile.model.text import demand_readable
from sspcompile.nested.adding import add_member, index_of, write_index
from sspcompile.nested.choose import Chosen, choose_members, measured, one_size
from sspcompile.nested.files import write_member, write_whole
from sspcompile.nested.index import Nested, read_nested
from sspcompile.nested.order import demand_nestable
from sspcompile.nested.proving import prove_whole
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, adding, silent
from sspcompile.proof.claim import Claim
from sspcompile.proof.parity import Parity
from sspcompile.proof.prove import prove
from sspcompile.repair.repair import refitted_dtype
from sspcompile.report.members import FRONTIER, members_json, members_page
from sspcompile.report.write import write_page
from sspcompile.request.domains import pools_fingerprint
from sspcompile.request.pools import pools_of
from sspcompile.request.recipe import dump_recipe
from sspcompile.request.request import Request
from sspcompile.request.splits import Holding
from sspcompile.select.scoring import toolkit_of
from sspcompile.slicing.plan import make_plan
from sspcompile.workspace import MODEL, PROBES, RECIPE, Workspace


@dataclass(frozen=True)
class NestedOutcome:
    """A finished nested build: its folder, what nested.json says, and how far the whole model is from the dense one."""

    folder: Path
    nested: Nested
    parity: Parity


def refuse_nested(request: Request, dense: DenseModel, *, weights: bool = True) -> None:
    """Refuse what would be refused after much work: what cannot be nested, and a smallest size below the floors."""
    demand_nestable(dense.checkpoint.geometry, request.options)
    refuse_hopeless(one_size(request, request.options.shares[-1]), dense, weights=weights)


def build_nested(
    request: Request,
    dense: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
    placement: Placement = ANYWHERE,
) -> NestedOutcome:
    """Read the scenario, decide what every size keeps, write the whole model in the order of removal and the repair of
    each member beside it, and prove all of them. Whole or absent, and resumable, as `build` is.
    """
    refuse_nested(request, dense)
    reads = (*dense_reads(dense), *pool_reads(request.options))
    refuse_existing(out, overwrite=overwrite, reads=reads)
    place = resolve(placement)
    remove_old(workspace)
    target = staged(out, overwrite=overwrite, reads=reads)
    with claimed(passes_folder(request, dense, workspace)) as journal, target as folder:
        loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
        demand_readable(loaded, request.scenario.prompts, request.options.max_tokens)
        smallest = one_size(request, request.options.shares[-1])
        toolkit = toolkit_of(smallest, dense, loaded, workspace, progress)
        members = []
        with keeping(journal):
            dtype = refitted_dtype(dense.checkpoint)
            chosen, judge = choose_members(request, toolkit, loaded, dtype=dtype, progress=progress)
            for size, found in zip(chosen.sizes, measured(chosen, judge, dense.checkpoint), strict=True):
                members.append(add_member(folder, dense.checkpoint, size, found.repair, found.cost))
                del found
        del loaded, judge  # the proof takes as much memory again
        release()
        nested = index_of(dense.checkpoint.geometry, chosen.order, members)
        _write(folder, dense, nested, progress)
        parity = prove_whole(
            dense.checkpoint, folder / MODEL, nested.order, chosen.probes, progress, placement=placement
        )
        _prove_members(folder, dense, nested, chosen, out, progress)
        origin = _origin(request, dense, chosen, toolkit, place.facts())
        _describe(folder, out.name, request, nested, chosen, parity, origin)
    workspace.remember(out)
    return NestedOutcome(out, nested, parity)


def _write(folder: Path, dense: DenseModel, nested: Nested, progress: Progress) -> None:
    write_whole(
        dense.checkpoint,
        nested.order,
        folder / MODEL,
        progress=adding(progress, "reordering", nested.members[0].weight_bytes),
    )
    write_index(folder, nested)


def _prove_members(
    folder: Path, dense: DenseModel, nested: Nested, chosen: Chosen, out: Path, progress: Progress
) -> None:
    """Cut every smaller member out of what was written, and hold it against the masked dense model, layer by layer."""
    for member, size in zip(nested.members[1:], chosen.sizes[1:], strict=True):
        mask, plan = size.mask, make_plan(dense.checkpoint, size.mask)
        with scratch(out.absolute().parent, f"{out.name}-member") as cut:
            refitted = write_member(folder, nested, member, mask, plan, cut)
            claim = Claim(dense.checkpoint, mask, cut, plan.custom_code, refitted)
            prove(claim, chosen.probes, progress, layerwise=True)


def _origin(
    request: Request, dense: DenseModel, chosen: Chosen, toolkit: Toolkit, facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "sspcompile": sspcompile.__version__,
        **dense.origin,
        "licence": licence_of(dense.checkpoint.path),
        "left_out": not_carried(dense.checkpoint.path),
        "pools": pools_fingerprint(pools_of(request.options).candidates),
        "seed": request.options.seed,
        **facts,
        "versions": toolkit.meta.get("versions", {}),
        "holding": int(Holding.SPACED),
        "evidence": chosen.reading.splits.counts(),
        "nested": [size.share for size in chosen.sizes],
    }


def _describe(
    folder: Path, name: str, request: Request, nested: Nested, chosen: Chosen, parity: Parity, origin: Mapping[str, Any]
) -> None:
    (folder / RECIPE).write_text(dump_recipe(request.recipe()), "utf-8")
    proof = {"probes": chosen.probes, "refitted": [], **asdict(parity), "relative": parity.relative}
    (folder / PROBES).write_text(json.dumps(proof) + "\n", "utf-8")
    title = f"{request.scenario.name}: one model, {len(nested.members)} sizes"
    write_page(members_page(title, nested), members_json(nested), folder, FRONTIER)
    (folder / MODEL / CARD).write_text(nested_card(nested, origin, name, request.scenario.name), "utf-8")
    write_manifest(folder, origin)


def verify_nested(
    folder: Path, dense: DenseModel, progress: Progress, *, layerwise: bool | None, placement: Placement
) -> Parity:
    """Hold the whole model against the dense one; `slice --from` and `verify` do so for a member."""
    probes = json.loads((folder / PROBES).read_text("utf-8"))["probes"]
    order = read_nested(folder).order
    return prove_whole(
        dense.checkpoint, folder / MODEL, order, probes, progress, layerwise=layerwise, placement=placement
    )
