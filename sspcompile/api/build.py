"""`build`: from a request to a published artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sspcompile.api.latency import table_for
from sspcompile.api.outcome import Outcome
from sspcompile.api.reads import dense_reads, pool_reads
from sspcompile.api.refusing import demand_bounds, refuse_hopeless
from sspcompile.api.reporting import origin_of, report_of
from sspcompile.api.rounding import demand_rounding, export_rounded, rounding_of
from sspcompile.api.token_time import token_time
from sspcompile.api.unfinished import passes_folder, remove_old
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.export.card import CARD, model_card
from sspcompile.export.refitted import write_refitted
from sspcompile.model.chat import rendering_of
from sspcompile.model.dense import DenseModel
from sspcompile.model.journal import claimed, keeping
from sspcompile.model.placement import ANYWHERE, Placement, release, resolve
from sspcompile.model.text import demand_readable
from sspcompile.progress import Progress, adding, silent
from sspcompile.proof.claim import Claim
from sspcompile.proof.prove import prove
from sspcompile.repair.repair import refitted_dtype
from sspcompile.report.model import RoundingSection
from sspcompile.report.write import write_report
from sspcompile.request.recipe import dump_recipe
from sspcompile.request.request import Request
from sspcompile.select.budget import bounds_of, serving_of
from sspcompile.select.scoring import toolkit_of
from sspcompile.select.selection import Selection, select
from sspcompile.slicing.latency import LatencyTable, latency_json
from sspcompile.slicing.mask import dump_mask
from sspcompile.slicing.plan import SlicePlan, make_plan, plan_json
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MASK, MODEL, PLAN, PROBES, RECIPE, Workspace


def build(
    request: Request,
    dense: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
    placement: Placement = ANYWHERE,
) -> Outcome:
    """Read the scenario, decide what stays, cut, prove and publish; with `quantize` round the cut, and weigh that.

    Nothing but what an interrupted run had measured is left behind when any step fails. The next run of the request
    goes on with that.
    """
    refuse_hopeless(request, dense)
    place = resolve(placement)
    reads = (*dense_reads(dense), *pool_reads(request.options))
    refuse_existing(out, overwrite=overwrite, reads=reads)
    demand_rounding(request, dense, out, workspace, overwrite=overwrite)
    remove_old(workspace)
    table = _timed(request, dense, workspace, progress, placement)
    target = staged(out, overwrite=overwrite, reads=reads)
    with claimed(passes_folder(request, dense, workspace)) as journal, target as folder:
        loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
        demand_readable(loaded, request.scenario.prompts, request.options.max_tokens)
        toolkit = toolkit_of(request, dense, loaded, workspace, progress)
        with keeping(journal):
            dtype = refitted_dtype(dense.checkpoint)
            selection = select(request, toolkit, loaded, dtype=dtype, progress=progress, table=table)
        del loaded  # the proof takes as much memory again
        release()
        plan = make_plan(dense.checkpoint, selection.mask, host=request.options.wanted_host)
        refitted = _write(folder / MODEL, dense, selection, plan, progress)
        claim = Claim(dense.checkpoint, selection.mask, folder / MODEL, plan.custom_code, refitted)
        if request.options.quantize is not None and selection.rounded is not None:
            words = selection.rounded.replaced(selection.mask.units, plan.geometry)
            write_refitted(folder, request.options.quantize, plan, words)
        parity = prove(claim, selection.probes, progress, placement=placement)
        rounding = _weighed(folder, request, dense, selection, plan, progress, placement)
        models = dense.checkpoint.path, folder / MODEL
        took = token_time(request.options, plan, table, *models, placement, progress)
        outcome = Outcome(out, dense, request, toolkit, selection, plan, parity, place, rounding, table, took)
        _describe(folder, outcome, refitted, progress)
    workspace.remember(out)
    if request.options.quantize is not None:
        export_rounded(out, request.options.quantize, workspace, progress, overwrite=overwrite, placement=placement)
    return outcome


def take_part(
    request: Request,
    dense: DenseModel,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    placement: Placement = ANYWHERE,
) -> None:
    """What `build` does of the measuring in every further process of torchrun, step by step with it; writes nothing."""
    table = _timed(request, dense, workspace, progress, placement)
    loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
    toolkit = toolkit_of(request, dense, loaded, workspace, progress)
    select(request, toolkit, loaded, dtype=refitted_dtype(dense.checkpoint), progress=progress, table=table)


def _timed(
    request: Request, dense: DenseModel, workspace: Workspace, progress: Progress, placement: Placement
) -> LatencyTable | None:
    """What a bound on time counts by, None where there is none. Raises BudgetError where no mask can be within it."""
    table = table_for(request.options, dense.checkpoint, workspace, placement, progress)
    if table is not None:
        demand_bounds(request.options, dense.checkpoint.geometry, bounds_of(request.options, dense.checkpoint, table))
    return table


def _write(
    folder: Path, dense: DenseModel, selection: Selection, plan: SlicePlan, progress: Progress
) -> Mapping[str, np.ndarray]:
    """Cut the model out of the dense one's files; gives the tensors that a repair computed, by name."""
    repair = selection.repair
    refitted = repair.replaced(selection.mask.units, plan.geometry) if repair is not None else {}

    write_model(
        dense.checkpoint,
        plan,
        folder,
        replaced=refitted,
        progress=adding(progress, "cutting", plan.sliced.weight_bytes),
    )
    return refitted


def _weighed(
    folder: Path,
    request: Request,
    dense: DenseModel,
    selection: Selection,
    plan: SlicePlan,
    progress: Progress,
    placement: Placement,
) -> RoundingSection | None:
    """The cut in the staged `folder`, rounded, beside the dense model; None where that was not asked."""
    if request.options.quantize is None:
        return None
    return rounding_of(
        dense,
        folder / MODEL,
        selection.judged.texts,
        request.options.quantize,
        folder,
        owners=selection.judged.owners,
        refitted=folder,
        custom_code=plan.custom_code,
        seed=request.options.seed,
        placement=placement,
        progress=progress,
    )


def _describe(folder: Path, outcome: Outcome, refitted: Iterable[str], progress: Progress) -> None:
    """Everything beside the weights: recipe, mask, plan, what the proof was made with, report, model card, manifest."""
    progress("describing", 0, 1)
    serving = serving_of(outcome.request.options, outcome.dense.checkpoint.config)
    plan = plan_json(outcome.plan, serving) | latency_json(outcome.plan, outcome.table)
    origin = origin_of(outcome)
    (folder / RECIPE).write_text(dump_recipe(outcome.request.recipe()), "utf-8")
    (folder / MASK).write_text(dump_mask(outcome.selection.mask), "utf-8")
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", "utf-8")
    parity = outcome.parity
    proof = {"probes": outcome.selection.probes, "refitted": sorted(refitted), **asdict(parity)}
    (folder / PROBES).write_text(json.dumps({**proof, "relative": parity.relative}) + "\n", "utf-8")
    report = report_of(outcome)
    write_report(report, folder)
    card = model_card(report.model_dump(mode="json"), plan, origin, outcome.folder.name)
    (folder / MODEL / CARD).write_text(card, "utf-8")
    write_manifest(folder, origin)
    progress("describing", 1, 1)
