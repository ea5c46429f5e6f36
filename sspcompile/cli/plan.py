"""`sspcompile plan`: what a build would write, without touching weights."""

from __future__ import annotations

import json
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
    from sspcompile.pipeline.compiling import Subject
    from sspcompile.recipe import Recipe
    from sspcompile.scenario import Scenario
    from sspcompile.slicing.plan import SlicePlan


# Head counts need no scenario, but options are resolved together with one.
UNNAMED = "a model without a scenario"


@click.command(
    short_help="Show what a build would write, and touch no weights.",
    epilog="""\b
Examples:
  sspcompile plan --scenario finance-desk --keep 0.5
  sspcompile plan --model ./Llama-3.1-8B --keep 0.5 --layout uniform     (a config.json is enough)
"""
)
@build_options
@json_option
@quiet_option
def plan(scenario: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show parameters, bytes, KV bytes per token and which runtimes will load the result.

    Without a scenario, or for a folder that holds no weights, sizes follow from the head counts alone: which heads
    stay is then left open. With --layout auto both layouts are shown, because `build` measures before it chooses;
    --json then has the uniform one at the top and both under "layouts".
    """
    read, options = request(scenario or UNNAMED, given)
    from sspcompile.pipeline.compiling import open_subject

    subject = open_subject(options.model)
    refuse_hopeless(read, subject, options)
    if scenario is None or not subject.checkpoint.has_weights:
        plans = _by_counts(subject, options)
    else:
        plans = _by_scenario(read, subject, options, quiet)
    if as_json:
        from sspcompile.slicing.plan import plan_json

        shown = [plan_json(one) for one in plans]
        click.echo(json.dumps({**shown[0], "layouts": shown}, indent=1))
        return
    from sspcompile.cli.tables import print_plan

    for one in plans:
        print_plan(one)


def _by_counts(subject: Subject, options: Recipe) -> list[SlicePlan]:
    from sspcompile.errors import InputError
    from sspcompile.slicing.plan import plan_counts

    if options.keep is None:
        raise InputError(
            "--strength needs a scenario and weights to find the breadth.", hint="Give --keep to plan by size alone."
        )
    layout = "uniform" if options.layout in (None, "auto") else options.layout
    return [plan_counts(subject.checkpoint, options.keep, layout)]


def _by_scenario(read: Scenario, subject: Subject, options: Recipe, quiet: bool) -> list[SlicePlan]:
    from sspcompile.cli.progress import stages
    from sspcompile.pipeline.compiling import choices_for, compile_scenario, mask_of, score_key, toolkit_for
    from sspcompile.slicing.plan import make_plan
    from sspcompile.workspace import Workspace

    with stages(quiet) as progress:
        loaded = subject.load()
        toolkit, _ = toolkit_for(subject, loaded, options, Workspace(here()), progress, [score_key(options)])
        compiled = compile_scenario(read, options, toolkit, loaded, progress)
    warn_unknown(compiled.mixture)
    choices = choices_for(compiled, subject, options.layout or "auto")
    masks = [mask_of(compiled, subject, choice, layout) for layout, choice in choices.items()]
    return [make_plan(subject.checkpoint, mask) for mask in masks]
