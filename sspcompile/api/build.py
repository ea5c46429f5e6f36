"""`build`: from a request to a published artifact."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from sspcompile.api.outcome import Outcome
from sspcompile.api.refusing import refuse_hopeless
from sspcompile.api.reporting import origin_of, report_of
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.errors import CheckpointError, ParityError
from sspcompile.export.card import CARD, model_card
from sspcompile.model.chat import rendering_of
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.text import demand_readable
from sspcompile.prepare.toolkits import toolkit_for
from sspcompile.progress import Progress, silent
from sspcompile.proof.parity import Parity, compare, demand, unchanged_tensors
from sspcompile.report.write import write_report
from sspcompile.request.recipe import dump_recipe
from sspcompile.request.request import Request
from sspcompile.select.reading import score_key
from sspcompile.select.selection import Selection, select
from sspcompile.slicing.mask import dump_mask
from sspcompile.slicing.plan import SlicePlan, make_plan, plan_json
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MASK, MODEL, PLAN, PROBES, RECIPE, Workspace

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def build(
    request: Request,
    dense: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
) -> Outcome:
    """Read the scenario, decide what stays, cut, prove and publish. Nothing is left behind when any step fails."""
    refuse_hopeless(request, dense)
    with staged(out, overwrite=overwrite) as folder:
        loaded = dense.load(rendering=rendering_of(request.options))
        demand_readable(loaded, request.scenario.prompts, request.options.max_tokens)
        toolkit, _ = toolkit_for(dense, loaded, request.options, workspace, progress, [score_key(request.options)])
        selection = select(request, toolkit, loaded, dtype=_weight_dtype(dense), progress=progress)
        plan = make_plan(dense.checkpoint, selection.mask, host=request.options.wanted_host)
        _write(folder / MODEL, dense, selection, plan, progress)
        parity = _prove(folder / MODEL, dense, loaded, selection, plan, progress)
        outcome = Outcome(out, dense, request, toolkit, selection, plan, parity)
        _describe(folder, outcome, progress)
    workspace.remember(out)
    return outcome


def _weight_dtype(dense: DenseModel) -> torch.dtype:
    stored = dense.checkpoint.tensors["model.layers.0.self_attn.o_proj.weight"].dtype
    if stored not in TORCH_DTYPE:
        raise CheckpointError(f"o_proj is stored as {stored}.", hint=f"Accepted: {', '.join(TORCH_DTYPE)}.")
    return TORCH_DTYPE[stored]


def _write(folder: Path, dense: DenseModel, selection: Selection, plan: SlicePlan, progress: Progress) -> None:
    repair, done = selection.repair, 0
    replaced = repair.replaced(selection.mask.kept, plan.geometry.head_dim) if repair is not None else None

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("cutting", done, plan.sliced.weight_bytes)

    write_model(dense.checkpoint, plan, folder, replaced=replaced, progress=wrote)


def _prove(
    folder: Path, dense: DenseModel, loaded: LoadedModel, selection: Selection, plan: SlicePlan, progress: Progress
) -> Parity:
    """The proof that the written model is the masked one; what it was made with stays in the artifact."""
    progress("proving", 0, 1)
    if plan.keeps_everything and not unchanged_tensors(dense.checkpoint, folder):
        raise ParityError("A mask that keeps every head changed a tensor.", hint="Please report this.")
    repair, probes = selection.repair, [list(ids) for ids in selection.probes]
    parity = compare(loaded, selection.mask, repair, folder, probes, custom_code=plan.custom_code)
    demand(parity)
    progress("proving", 1, 1)
    changed = {"repaired": repair is not None, "down_refitted": repair is not None and bool(repair.down)}
    record = {"probes": probes, **changed, **asdict(parity), "relative": parity.relative}
    (folder.parent / PROBES).write_text(json.dumps(record) + "\n", "utf-8")
    return parity


def _describe(folder: Path, outcome: Outcome, progress: Progress) -> None:
    """Everything beside the weights: recipe, mask, plan, report, model card, manifest."""
    progress("describing", 0, 1)
    plan, origin = plan_json(outcome.plan), origin_of(outcome)
    (folder / RECIPE).write_text(dump_recipe(outcome.request.recipe()), "utf-8")
    (folder / MASK).write_text(dump_mask(outcome.selection.mask), "utf-8")
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", "utf-8")
    report = report_of(outcome)
    write_report(report, folder)
    card = model_card(report.model_dump(mode="json"), plan, origin, outcome.folder.name)
    (folder / MODEL / CARD).write_text(card, "utf-8")
    write_manifest(folder, origin)
    progress("describing", 1, 1)
