"""`build`: from a resolved recipe to a published artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from sspcompile.api.outcome import Outcome
from sspcompile.api.reporting import origin_of, report_of
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.criteria.chance import first_layer_kept
from sspcompile.errors import CheckpointError, InputError, ParityError, UnsupportedModelError
from sspcompile.export.card import CARD, model_card
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.divergence import average
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.prepare.toolkits import STANDARD_CRITERIA, toolkit_for
from sspcompile.progress import Progress
from sspcompile.proof.parity import Parity, compare, demand, unchanged_tensors
from sspcompile.repair.repair import demand_place
from sspcompile.report import write_report
from sspcompile.request.recipe import AUTO, Recipe, dump_recipe
from sspcompile.request.scenario import Scenario
from sspcompile.select.budget import merit
from sspcompile.select.compiling import (
    Compiled,
    Ranking,
    choices_for,
    compile_scenario,
    evidence_for,
    mask_of,
    score_key,
)
from sspcompile.select.judging import Candidate, Judge, Reported, decide
from sspcompile.select.scoring import score_heads
from sspcompile.select.search import Shortlisted, best_mask, contenders
from sspcompile.slicing.hosts import named_host
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import HeadMask, Layout, dump_mask
from sspcompile.slicing.plan import SlicePlan, host_of, make_plan, plan_json
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MASK, MODEL, PLAN, PROBES, RECIPE, Workspace

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
BASELINE_SEEDS = 3


def build(
    scenario: Scenario,
    options: Recipe,
    subject: DenseModel,
    out: Path,
    workspace: Workspace,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Outcome:
    """Compile, judge, repair, cut, prove and publish. Nothing is left behind when any step fails."""
    if not subject.checkpoint.has_weights:
        raise CheckpointError(
            f"{subject.name} holds a configuration without weights.", hint="`sspcompile plan` works without them."
        )
    demand_place(subject.checkpoint.geometry, options.repair or "none")
    host = named_host(options.host)
    with staged(out, overwrite=overwrite) as folder:
        loaded = subject.load()
        toolkit, _ = toolkit_for(subject, loaded, options, workspace, progress, [score_key(options)])
        compiled = compile_scenario(scenario, options, toolkit, loaded, progress)
        choices = dict(choices_for(compiled, subject, options.layout or AUTO, host=host))
        judge = _judge(loaded, subject, compiled, options, progress)
        shortlists = _shortlists(judge, compiled, subject, choices, host) if options.criterion == AUTO else {}
        choices |= {layout: found.choice for layout, found in shortlists.items()}
        decision = decide(dict(zip(choices, judge.candidates(list(choices.items()), "layouts"), strict=True)))
        shortlist = shortlists.get(decision.chosen.layout)
        ranking = shortlist.ranking if shortlist is not None else None
        mask = mask_of(compiled, subject, decision.chosen.choice, decision.chosen.layout, ranking)
        if shortlist is not None:
            mask = replace(mask, scenario={**mask.scenario, "tried": [asdict(one) for one in shortlist.tried]})
        plan = make_plan(subject.checkpoint, mask, host=host)
        parity = _write_and_prove(folder, subject, loaded, mask, plan, decision.chosen, judge, progress)
        outcome = Outcome(
            folder=out,
            subject=subject,
            options=options,
            compiled=compiled,
            decision=decision,
            mask=mask,
            plan=plan,
            parity=parity,
            ours=judge.reported(decision.chosen),
            baselines=_baselines(judge, compiled, options, toolkit, decision.chosen),
            evidence=judge.evidence.counts(),
            toolkit=toolkit,
        )
        _describe(folder, outcome, progress)
    workspace.remember(out)
    return outcome


def _shortlists(
    judge: Judge, compiled: Compiled, subject: DenseModel, choices: Mapping[Layout, Choice], host: str | None
) -> dict[Layout, Shortlisted]:
    """The measured choice of every layout in which something is cut and a class holds one."""
    cut = [layout for layout, choice in choices.items() if not choice.kept.all()]
    if not cut:
        return {}

    def holds(layout: Layout, choice: Choice) -> bool:
        try:
            host_of(subject.checkpoint.geometry, choice.shapes, host, layout=layout)
        except (UnsupportedModelError, InputError):
            return False
        return True

    own = Ranking(compiled.criterion, compiled.scores.values)
    ranked = contenders(judge, own, cut, "group" if compiled.groups_only else "head")
    found = {
        layout: best_mask(
            judge,
            ranked,
            layout,
            compiled.whitelist,
            compiled.keep,
            groups_only=compiled.groups_only,
            holds=partial(holds, layout),
        )
        for layout in cut
    }
    return {layout: one for layout, one in found.items() if one is not None}


def _judge(loaded: LoadedModel, subject: DenseModel, compiled: Compiled, options: Recipe, progress: Progress) -> Judge:
    return Judge(
        loaded,
        evidence_for(compiled, options),
        max_tokens=options.max_tokens or 0,
        new_tokens=options.continuation_tokens or 0,
        seed=options.seed or 0,
        repair=options.repair or "none",
        dtype=_weight_dtype(subject),
        progress=progress,
    )


def _weight_dtype(subject: DenseModel) -> torch.dtype:
    stored = subject.checkpoint.tensors["model.layers.0.self_attn.o_proj.weight"].dtype
    if stored not in TORCH_DTYPE:
        raise CheckpointError(f"o_proj is stored as {stored}.", hint=f"Accepted: {', '.join(TORCH_DTYPE)}.")
    return TORCH_DTYPE[stored]


def _write_and_prove(
    folder: Path,
    subject: DenseModel,
    loaded: LoadedModel,
    mask: HeadMask,
    plan: SlicePlan,
    chosen: Candidate,
    judge: Judge,
    progress: Progress,
) -> Parity:
    repair = chosen.final_repair
    replaced = repair.replaced(mask.kept, plan.geometry.head_dim) if repair is not None else None
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("cutting", done, plan.sliced.weight_bytes)

    write_model(subject.checkpoint, plan, folder / MODEL, replaced=replaced, progress=wrote)
    progress("proving", 0, 1)
    if plan.keeps_everything and not unchanged_tensors(subject.checkpoint, folder / MODEL):
        raise ParityError("A mask that keeps every head changed a tensor.", hint="Please report this.")
    probes = _probe_ids(judge)
    parity = compare(loaded, mask, repair, folder / MODEL, probes, custom_code=plan.custom_code)
    demand(parity)
    progress("proving", 1, 1)
    changed = {"repaired": repair is not None, "down_refitted": repair is not None and bool(repair.down)}
    record = {"probes": probes, **changed, **asdict(parity), "relative": parity.relative}
    (folder / PROBES).write_text(json.dumps(record) + "\n", "utf-8")
    return parity


def _probe_ids(judge: Judge) -> list[list[int]]:
    """Token ids of the held-out texts, unpadded, shortest and longest among them."""
    rows = [
        batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        for batch in judge.held
        for row in range(len(batch.rows))
    ]
    step = max(1, len(rows) // 5)
    return rows[::step][:5] + rows[-1:]


def _baselines(
    judge: Judge, compiled: Compiled, options: Recipe, toolkit: Toolkit, chosen: Candidate
) -> dict[str, Reported]:
    """What else could have been cut at this budget and in this layout, from the same texts and with the same repair."""
    random = [first_layer_kept(compiled.merit.shape, judge.seed + number) for number in range(BASELINE_SEEDS)]
    named = {"domain-free mask": merit(toolkit.importance[compiled.criterion].mean(-1), compiled.whitelist)}
    for name in STANDARD_CRITERIA:
        if name != compiled.criterion:
            scores = score_heads(compiled.scenario, compiled.used, options, toolkit, judge.loaded, name)
            named[f"criterion {name}"] = merit(scores.values, compiled.whitelist)
    kv_heads = judge.loaded.geometry.kv_heads
    choices = [
        (chosen.layout, choose(values, kv_heads, compiled.keep, chosen.layout, groups_only=compiled.groups_only))
        for values in (*random, *named.values())
    ]
    reported = [judge.reported(one) for one in judge.candidates(choices, "baselines")]
    averaged = _average(reported[:BASELINE_SEEDS], judge.seed)
    return {
        f"random, first layer kept ({BASELINE_SEEDS}x)": averaged,
        **dict(zip(named, reported[BASELINE_SEEDS:], strict=True)),
    }


def _average(models: list[Reported], seed: int) -> Reported:
    off = [model.off for model in models if model.off is not None]
    return Reported(average([model.own for model in models], seed=seed), average(off, seed=seed) if off else None)


def _describe(folder: Path, outcome: Outcome, progress: Progress) -> None:
    """Everything beside the weights: recipe, mask, plan, report, manifest."""
    (folder / RECIPE).write_text(dump_recipe(outcome.options), "utf-8")
    (folder / MASK).write_text(dump_mask(outcome.mask), "utf-8")
    (folder / PLAN).write_text(json.dumps(plan_json(outcome.plan), indent=1) + "\n", "utf-8")
    report, origin = report_of(outcome), origin_of(outcome)
    write_report(report, folder)
    card = model_card(report.model_dump(mode="json"), plan_json(outcome.plan), origin, outcome.folder.name)
    (folder / MODEL / CARD).write_text(card, "utf-8")
    progress("describing", 0, 1)
    write_manifest(folder, origin)
    progress("describing", 1, 1)
