"""What can be refused before any heavy work, is."""

from __future__ import annotations

import numpy as np

from sspcompile.api.settings import context_warning, demand_settings
from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry
from sspcompile.model.dense import DenseModel
from sspcompile.repair.repair import demand_place, is_linear
from sspcompile.request.holding import demand_held_out
from sspcompile.request.options import WHOLE_LAYOUTS, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.request import Request
from sspcompile.select.budget import counted_bounds, cuts_channels, refuse_several
from sspcompile.select.mixture import demand_known
from sspcompile.select.scoring import demand_prompts
from sspcompile.slicing.depth import demand_layer
from sspcompile.slicing.hosts import demand_host
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.sizes import Bounds, demand


def refuse_hopeless(request: Request, dense: DenseModel, *, weights: bool = True) -> None:
    """Refuse what would be refused after much work. Raises InputError or BudgetError; a bound on time, which only a
    measurement can refuse, is left open.

    `weights`: whether the checkpoint must hold some.
    """
    options, geometry = request.options, dense.checkpoint.geometry
    refuse_several(options)
    if weights and not dense.checkpoint.has_weights:
        raise CheckpointError(
            f"{dense.name} holds a configuration without weights.", hint="`sspcompile plan` works without them."
        )
    demand_settings(options)
    demand_prompts(request)
    known = [pool.name for pool in pools_of(options).candidates]
    demand_known(request.scenario.domains or (), known, source=request.scenario.name)
    demand_held_out(request.scenario, options)
    demand_place(geometry, options.repair)
    demand_host(geometry, WHOLE_LAYOUTS[options.whole] if options.whole else options.layout, options.wanted_host)
    demand_bounds(options, geometry, counted_bounds(options, dense.checkpoint))
    if options.keep is not None:
        # Whether a budget is feasible follows from the counts alone, whatever the scores are.
        even = np.ones((geometry.layers, geometry.heads))
        choose(even, geometry.kv_heads, options.keep, "per-layer", groups_only=options.granularity == "group")


def demand_bounds(options: Options, geometry: Geometry, bounds: Bounds) -> None:
    """Raise BudgetError, naming the nearest feasible values, where no mask is within the bounds."""
    if options.whole is not None:
        demand_layer(geometry, bounds, options.whole)
        return
    groups_only = options.granularity == "group"
    demand(geometry, bounds, channels=cuts_channels(options, geometry), groups_only=groups_only)


def warnings_of(request: Request, dense: DenseModel) -> list[str]:
    """What the user should know before the work starts, a sentence each."""
    family = dense.checkpoint.geometry.family
    context = context_warning(request.options, dense.checkpoint.config)
    said = [] if context is None else [context]
    if request.options.repair != "least-squares" or is_linear(dense.checkpoint.geometry):
        return said
    return [
        *said,
        f"There is no repair for {family.architecture}: a norm stands between o_proj and the residual stream, so least "
        "squares does not apply.",
    ]
