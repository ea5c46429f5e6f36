"""`plan`: what a build would write, worked out without touching weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sspcompile.api.latency import table_for
from sspcompile.api.settings import demand_settings
from sspcompile.api.slice import open_cut
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.model.dense import open_dense, open_sizes
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.progress import Progress, silent
from sspcompile.request.options import AUTO, Options, default_of
from sspcompile.request.request import Request
from sspcompile.select.budget import (
    Budget,
    bounded,
    bounds_of,
    budget_of,
    counted_bounds,
    cuts_channels,
    refuse_several,
    serving_of,
)
from sspcompile.slicing.depth import shallowest
from sspcompile.slicing.frontier import Frontier, frontier_of
from sspcompile.slicing.latency import LatencyTable, latency_of
from sspcompile.slicing.mask import Layout
from sspcompile.slicing.measures import Serving, of_size, parameters_of
from sspcompile.slicing.plan import SlicePlan, make_plan, plan_counts, plan_within
from sspcompile.slicing.sizes import smallest_size
from sspcompile.workspace import Workspace

if TYPE_CHECKING:
    from sspcompile.model.dense import DenseModel
    from sspcompile.select.reading import Reading

# What is planned where the budget is a bound on the loss: only a build, which measures, knows what that leaves. Of all
# parameters where channels of the MLPs or whole units may go, of the heads otherwise.
PLANNED_SIZE = 0.9
PLANNED_KEEP = 0.75
# Heads are a tenth to a third of a model: a size that is meant for all of it takes most of them.
FEW_HEADS = 0.5


def assumed(options: Options, checkpoint: Checkpoint) -> Budget | None:
    """What is planned in place of a bound on the loss; None where another budget stands, alone or beside it."""
    geometry = checkpoint.geometry
    if not options.floored or bounded(options):
        return None
    # Of a small model with a large vocabulary more than that stays whatever is cut.
    if options.whole is not None:
        parameters = parameters_of(geometry, checkpoint.expected(), options.wanted_host)
        smallest = shallowest(parameters, options.whole) / parameters.whole
    elif cuts_channels(options, geometry):
        smallest = smallest_size(geometry, channels=True, groups_only=options.granularity == "group")
    else:
        return Budget(PLANNED_KEEP)
    share = max(PLANNED_SIZE, math.ceil(1e4 * smallest) / 1e4)
    return Budget(bounds=(of_size(geometry, share, checkpoint.expected(), options.wanted_host),))


def plan_mask(model: str | None, mask: Path, host: str | None) -> SlicePlan:
    """The cut of a mask that was compiled before. Raises ArtifactError when it names another model."""
    return open_cut(model, mask, host=host, unnamed=True).plan


def table_of_plan(
    options: Options, workspace: Workspace, placement: Placement = ANYWHERE, progress: Progress = silent
) -> LatencyTable | None:
    """What a bound on time counts by, measured where it was not before; None where there is none. Raises like
    `table_for`, and BudgetError, before anything is measured, for another bound that no mask is within.
    """
    if options.max_latency is None:
        return None
    from sspcompile.api.refusing import demand_bounds

    checkpoint = open_sizes(options.source)
    demand_plannable(options, checkpoint)
    demand_bounds(options, checkpoint.geometry, counted_bounds(options, checkpoint))
    return table_for(options, checkpoint, workspace, placement, progress)


def demand_plannable(options: Options, checkpoint: Checkpoint) -> None:
    """Refuse what `build` would refuse of options that no size follows from. Raises InputError."""
    demand_settings(options)
    if options.repair != default_of("repair"):
        from sspcompile.repair.repair import demand_place  # needs torch

        demand_place(checkpoint.geometry, options.repair)


def plan_sizes(options: Options, table: LatencyTable | None = None) -> SlicePlan:
    """The cut by counts alone, from headers or a config.json: which heads and channels stay is left open. `table`: what
    a bound on time counts by.

    Without a budget it is that of `assumed`. Raises InputError for a budget that follows from a scenario,
    UnsupportedModelError for a layout that no class holds, and BudgetError.
    """
    refuse_several(options)
    checkpoint, host = open_sizes(options.source), options.wanted_host
    demand_plannable(options, checkpoint)
    if options.strength is not None:
        raise InputError(
            "--strength needs a scenario and weights to find the breadth.",
            hint="Give --size or --keep to plan by counts alone.",
        )
    budget = assumed(options, checkpoint) or budget_of(
        options, checkpoint.geometry, bounds_of(options, checkpoint, table), breadth=1.0
    )
    if options.layout != "auto":
        return _planned(checkpoint, options, budget, options.layout, host)
    try:
        return _planned(checkpoint, options, budget, "uniform", host)
    except UnsupportedModelError:
        if host is not None:
            raise
        # As `build` does: auto leaves out the layout that no class can hold.
        return _planned(checkpoint, options, budget, "per-layer", None)


def _planned(checkpoint: Checkpoint, options: Options, budget: Budget, layout: Layout, host: str | None) -> SlicePlan:
    groups_only = options.granularity == "group"
    if budget.bounds:
        channels = cuts_channels(options, checkpoint.geometry)
        return plan_within(
            checkpoint,
            budget.bounds,
            layout,
            channels=channels,
            whole=options.whole,
            host=host,
            groups_only=groups_only,
        )
    return plan_counts(checkpoint, budget.keep, layout, host=host, groups_only=groups_only)


def few_heads(options: Options) -> str | None:
    """That a budget of parameters or bytes leaves few heads where nothing else may go, in a sentence."""
    geometry = open_sizes(options.source).geometry
    counted = bounded(options) and options.max_latency is None
    if not counted or options.whole is not None or cuts_channels(options, geometry):
        return None
    kept = sum(heads for heads, _ in plan_sizes(options).counts)
    if kept < FEW_HEADS * geometry.layers * geometry.heads:
        why = next((told for told, holds in _heads_alone(options) if holds), "of this family")
        return (
            f"Only heads go {why}, and {kept} of {geometry.layers * geometry.heads} stay within that budget. Where "
            "channels of the MLPs may go too, more of them stay; --keep says how many stay."
        )
    return None


def _heads_alone(options: Options) -> Iterator[tuple[str, bool]]:
    """What leaves the MLPs whole (`cuts_channels`), as it is told."""
    yield "with --units heads", options.units == "heads"
    yield f"with --criterion {options.criterion}", options.criterion != AUTO
    yield "with --importance-from domains", options.importance_from == "domains"
    yield f"with --without {' '.join(options.without)}", bool(options.without)


def served(options: Options) -> Serving:
    """What memory and time are counted for."""
    return serving_of(options, open_sizes(options.source).config)


def reachable(options: Options, table: LatencyTable | None = None) -> Frontier:
    """What sizes a build can come to, in the layouts that it may take, whatever its budget, and the time of a token
    where a `table` foretells it. Raises CheckpointError and its kin for what cannot be planned.
    """
    checkpoint, host = open_sizes(options.source), options.wanted_host
    demand_plannable(options, checkpoint)
    layouts: tuple[Layout, ...] = ("uniform", "per-layer") if options.layout == "auto" else (options.layout,)
    return frontier_of(
        checkpoint,
        serving_of(options, checkpoint.config),
        layouts if host is None else ("uniform",),
        channels=cuts_channels(options, checkpoint.geometry),
        whole=options.whole,
        host=host,
        groups_only=options.granularity == "group",
        latency=None if table is None else latency_of(checkpoint.geometry, table),
    )


def plan_scenario(
    request: Request, workspace: Workspace, progress: Progress = silent, *, placement: Placement = ANYWHERE
) -> tuple[list[SlicePlan], Reading]:
    """The cuts that the scores of a scenario ask for, one for each layout in question, and how the scenario was read.

    Prepares the model's toolkit where there is none. `build` goes on to measure these masks and others, and chooses.
    Where the budget is a bound on the loss, the cuts are those of `assumed`.
    """
    # Sizes alone need neither torch nor the weights' fingerprint.
    from sspcompile.api.refusing import refuse_hopeless
    from sspcompile.model.chat import rendering_of
    from sspcompile.model.text import demand_readable
    from sspcompile.select.reading import choices_for, read_through
    from sspcompile.select.scoring import toolkit_of
    from sspcompile.select.selection import mask_of
    from sspcompile.select.texts import Texts

    options = request.options
    dense = open_dense(options.source)
    refuse_hopeless(request, dense)
    table = table_for(options, dense.checkpoint, workspace, placement, progress)
    loaded = dense.load(placement=placement, rendering=rendering_of(options))
    demand_readable(loaded, request.scenario.prompts, options.max_tokens)
    toolkit = toolkit_of(request, dense, loaded, workspace, progress)
    reading = read_through(request, toolkit, loaded, Texts(loaded, options), progress, build=False, table=table)
    reading = replace(reading, budget=assumed(options, dense.checkpoint) or reading.budget)
    choices = choices_for(reading, loaded.geometry)
    masks = [mask_of(reading, loaded, choice, layout) for layout, choice in choices.items()]
    return [make_plan(dense.checkpoint, mask, host=options.wanted_host) for mask in masks], reading


def reads_pools(request: Request, dense: DenseModel, workspace: Workspace) -> bool:
    """Whether the model has no toolkit yet, and reads the domain pools for one before it plans a scenario."""
    from sspcompile.prepare.toolkits import is_stated, toolkit_folder
    from sspcompile.select.scoring import cached_keys

    options = request.options
    stated = is_stated(request.scenario, options, cached_keys(request))
    return not stated and not toolkit_folder(dense, options, workspace).exists()


def needs_model(options: Options) -> bool:
    """Whether something is asked for that more than the headers can refuse."""
    changed = (name for name in ("criterion", "repair") if getattr(options, name) != default_of(name))
    return any(changed) or options.pools is not None or options.protect is not None
