"""`sspcompile plan`: what a build would write, without touching weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    build_options,
    here,
    json_option,
    quiet_option,
    refuse_hopeless,
    request,
    warn_unknown,
)

if TYPE_CHECKING:
    from sspcompile.checkpoint import Checkpoint
    from sspcompile.request.recipe import Recipe
    from sspcompile.request.scenario import Scenario
    from sspcompile.slicing.plan import SlicePlan


# Head counts need no scenario, but options are resolved together with one.
UNNAMED = "a model without a scenario"


@click.command(
    short_help="Show what a build would write, and touch no weights.",
    epilog="""\b
Examples:
  sspcompile plan --scenario finance-desk --keep 0.5
  sspcompile plan --model ./Llama-3.1-8B --keep 0.5 --layout uniform     (a config.json is enough)
  sspcompile plan --model ./Qwen2.5-7B --mask artifacts/mine/mask.json --host seed_oss --by-layer
""",
)
@build_options
@click.option("--mask", type=click.Path(path_type=Path), help="Plan the cut of this mask.json instead of compiling.")
@click.option("--by-layer", is_flag=True, help="Also print a row for every layer (--json always has them).")
@json_option
@quiet_option
def plan(scenario: str | None, mask: Path | None, by_layer: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show parameters, bytes, KV bytes and FLOPs per token, and which runtimes will load the result.

    Without a scenario, or for a folder that holds no weights, sizes follow from the head counts alone, read from the
    headers in a moment whatever the size of the model: which heads stay is then left open. With --layout auto both
    layouts are shown, because `build` measures before it chooses; --json then has the uniform one at the top and both
    under "layouts".
    """
    from sspcompile.slicing.hosts import named_host

    if mask is not None:
        plans = [_of_mask(given["model"], mask, scenario, named_host(given["host"]))]
    else:
        read, options = request(scenario or UNNAMED, given)
        plans = _of_request(read, options, scenario is None, quiet)
    if as_json:
        from sspcompile.slicing.plan import plan_json

        shown = [plan_json(one) for one in plans]
        click.echo(json.dumps({**shown[0], "layouts": shown}, indent=1))
        return
    from sspcompile.cli.tables import print_plan

    for one in plans:
        print_plan(one, by_layer=by_layer)


def _of_mask(model: str | None, mask: Path, scenario: str | None, host: str | None) -> SlicePlan:
    from sspcompile.api.cutting import open_cut
    from sspcompile.errors import InputError

    if scenario is not None:
        raise InputError("--mask and --scenario exclude each other.", hint="A mask was compiled already; give one.")
    return open_cut(model, mask, host=host).plan


def _of_request(read: Scenario, options: Recipe, without_scenario: bool, quiet: bool) -> list[SlicePlan]:
    # Not through pipeline.compiling: sizes alone need neither torch nor the weights' fingerprint.
    from sspcompile.checkpoint import Checkpoint, locate
    from sspcompile.request.recipe import DEFAULTS

    checkpoint = Checkpoint(locate(options.model))
    if without_scenario or not checkpoint.has_weights:
        # What can be refused for other reasons than its sizes needs more than the headers.
        if options.criterion != DEFAULTS["criterion"] or options.repair != DEFAULTS["repair"] or options.pools:
            from sspcompile.model.dense import open_dense

            refuse_hopeless(read, open_dense(options.model), options)
        return _by_counts(checkpoint, options)
    return _by_scenario(read, options, quiet)


def _by_counts(checkpoint: Checkpoint, options: Recipe) -> list[SlicePlan]:
    from sspcompile.errors import InputError, UnsupportedModelError
    from sspcompile.slicing.hosts import named_host
    from sspcompile.slicing.plan import plan_counts

    if options.keep is None:
        raise InputError(
            "--strength needs a scenario and weights to find the breadth.", hint="Give --keep to plan by size alone."
        )
    host = named_host(options.host)
    if options.layout == "per-layer":
        return [plan_counts(checkpoint, options.keep, "per-layer", host=host)]
    try:
        return [plan_counts(checkpoint, options.keep, "uniform", host=host)]
    except UnsupportedModelError:
        if options.layout == "uniform" or host is not None:
            raise
        # As `build` does: auto leaves out the layout that no class can hold.
        return [plan_counts(checkpoint, options.keep, "per-layer")]


def _by_scenario(read: Scenario, options: Recipe, quiet: bool) -> list[SlicePlan]:
    from sspcompile.cli.progress import stages
    from sspcompile.model.dense import open_dense
    from sspcompile.prepare.toolkits import toolkit_for
    from sspcompile.select.compiling import choices_for, compile_scenario, mask_of, score_key
    from sspcompile.slicing.hosts import named_host
    from sspcompile.slicing.plan import make_plan
    from sspcompile.workspace import Workspace

    subject = open_dense(options.model)
    refuse_hopeless(read, subject, options)
    with stages(quiet) as progress:
        loaded = subject.load()
        toolkit, _ = toolkit_for(subject, loaded, options, Workspace(here()), progress, [score_key(options)])
        compiled = compile_scenario(read, options, toolkit, loaded, progress)
    warn_unknown(compiled.mixture)
    host = named_host(options.host)
    choices = choices_for(compiled, subject, options.layout or "auto", host=host)
    masks = [mask_of(compiled, subject, choice, layout) for layout, choice in choices.items()]
    return [make_plan(subject.checkpoint, mask, host=host) for mask in masks]
