"""`sspcompile plan`: what a build would write, without touching weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    PLACE,
    build_options,
    json_option,
    placement_in,
    placement_options,
    quiet_option,
    refuse_given,
    request_of,
    warn,
    warn_unknown,
    workspace,
)
from sspcompile.cli.sections import Sectioned

if TYPE_CHECKING:
    from sspcompile.model.placement import Placement
    from sspcompile.request.options import Options
    from sspcompile.request.request import Request
    from sspcompile.slicing.latency import LatencyTable
    from sspcompile.slicing.plan import SlicePlan

# Counts need no scenario, but options are resolved together with one.
UNNAMED = "a model without a scenario"
# All that `--from` takes beside it.
WITH_FROM = {"nested_artifact", "as_json", "quiet"}


@click.command(
    cls=Sectioned,
    short_help="Show what a build would write, and write nothing.",
    epilog="""\b
Examples:
  sspcompile plan --scenario finance-desk --size 0.8
  sspcompile plan --model ./Llama-3.1-8B --size 0.8 --layout uniform     (a config.json is enough)
  sspcompile plan --model ./Llama-3.1-8B --keep 0.5                      (heads alone)
  sspcompile plan --model ./Llama-3.1-8B --max-memory 16GB --context 32768 --batch 4
  sspcompile plan --model ./Llama-3.1-8B --max-latency 35ms --context 8192   (layers of other shapes are timed, once)
  sspcompile plan --model ./Qwen2.5-7B --scenario prompts.jsonl --cost   (one short pass is run)
  sspcompile plan --model ./Qwen2.5-7B --scenario prompts.jsonl --nested 1,0.9,0.8 --cost
  sspcompile plan --model ./Qwen2.5-7B --mask artifacts/mine/mask.json --host granite --by-layer
""",
)
@build_options
@click.option("--mask", type=PLACE, help="Plan the cut of this mask.json instead of compiling.")
@click.option("--from", "nested_artifact", metavar="NESTED", help="Show the members of a nested artifact instead.")
@click.option(
    "--cost", is_flag=True, help="Say instead what the build will cost here: passes, minutes and memory, by stage."
)
@click.option("--by-layer", is_flag=True, help="Also print a row for every layer (--json always has them).")
@placement_options
@json_option
@quiet_option
def plan(
    scenario: str | None,
    mask: Path | None,
    nested_artifact: str | None,
    cost: bool,
    by_layer: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Show parameters, bytes, KV bytes and FLOPs per token, and which runtimes will load the result.

    Without a scenario, or for a folder that holds no weights, sizes follow from counts alone, read from the headers in
    a moment whatever the size of the model: which heads and channels stay is then left open. With a scenario the model
    reads its texts, and before its first scenario the domain pools, which takes minutes. With --layout auto both
    layouts are shown then, because `build` measures before it chooses; --json then has the uniform one at the top and
    both under "layouts". The last table is what other sizes come to, down to the smallest; memory is that of weights
    and the KV cache of --batch sequences of --context tokens. With --max-latency it has the time of a token.
    """
    if nested_artifact is not None:
        _members(nested_artifact, as_json)
        return
    if cost:
        _cost(scenario, mask, as_json, given)
        return
    from sspcompile.api.plan import few_heads, reachable, served

    request, placement = request_of(scenario or UNNAMED, given), placement_in(given)
    plans = _plans(request, scenario, mask, quiet, placement)
    if mask is None and not quiet and (few := few_heads(request.options)):
        warn(few)
    table = _table(request.options, quiet, placement)
    if mask is None and not quiet:
        _say_budget(request.options)
    serving = served(request.options)
    frontier = reachable(request.options, table) if mask is None else None
    if as_json:
        from sspcompile.slicing.latency import latency_json
        from sspcompile.slicing.plan import plan_json

        shown = [plan_json(one, serving) | latency_json(one, table) for one in plans]
        known = {"frontier": frontier.as_mapping()} if frontier is not None else {}
        click.echo(json.dumps({**shown[0], "layouts": shown, **known}, indent=1))
        return
    from sspcompile.cli.tables import print_frontier, print_plan

    for one in plans:
        print_plan(one, serving, by_layer=by_layer, table=table)
    if frontier is not None:
        print_frontier(frontier)


def _members(argument: str, as_json: bool) -> None:
    context = click.get_current_context()
    others = {parameter.name for parameter in context.command.params} - WITH_FROM
    refuse_given(context, others, "does not go with --from", "Leave it out: its members are built already.")
    from sspcompile.api.arguments import demand, named
    from sspcompile.cli.tables import print_members
    from sspcompile.nested.index import read_nested

    found = demand(named(argument, workspace()), "nested", command="plan --from")
    print_members(found.name, read_nested(found.folder), as_json=as_json)


def _say_budget(options: Options) -> None:
    """That sizes are of a share that no build was asked for, where the budget is a bound on the loss."""
    if not options.floored:
        return
    from sspcompile.api.plan import assumed
    from sspcompile.model.dense import open_sizes

    budget = assumed(options, open_sizes(options.source))
    if budget is not None:
        flag = budget.option.split()[0]
        bounds = {"--max-loss": options.max_loss, "--max-perplexity": options.max_perplexity}
        asked = " and ".join(f"{name} {most:g}" for name, most in bounds.items() if most is not None)
        warn(
            f"Sizes are those of {budget.option}: how much can go for {asked} is measured by "
            f"`sspcompile build`. Give {flag} to plan another share."
        )


def _table(options: Options, quiet: bool, placement: Placement) -> LatencyTable | None:
    """What a bound on time counts by, measured where it was not before."""
    if options.max_latency is None:
        return None
    from sspcompile.api.plan import table_of_plan
    from sspcompile.cli.progress import stages

    with stages(quiet) as progress:
        return table_of_plan(options, workspace(), placement, progress)


def _plans(
    request: Request, scenario: str | None, mask: Path | None, quiet: bool, placement: Placement
) -> list[SlicePlan]:
    from sspcompile.api.plan import needs_model, plan_mask, plan_scenario, plan_sizes, reads_pools
    from sspcompile.errors import InputError
    from sspcompile.model.dense import holds_weights

    options = request.options
    if mask is not None:
        if scenario is not None:
            raise InputError("--mask and --scenario exclude each other.", hint="A mask was compiled already; give one.")
        _warn_context(options)
        return [plan_mask(options.source, mask, options.wanted_host)]
    sizes_only = scenario is None or not holds_weights(options.source)
    if sizes_only and not needs_model(options):
        _warn_context(options)
        return [plan_sizes(options, _table(options, quiet, placement))]
    from sspcompile.api.refusing import refuse_hopeless, warnings_of
    from sspcompile.model.dense import open_dense

    dense = open_dense(options.source)
    refuse_hopeless(request, dense, weights=not sizes_only)
    for warning in warnings_of(request, dense):
        warn(warning)
    if sizes_only:
        return [plan_sizes(options, _table(options, quiet, placement))]
    from sspcompile.cli.progress import stages

    if reads_pools(request, dense, workspace()) and not quiet:
        hint = "the sizes alone take a moment, without --scenario."
        click.echo(f"The model first reads the domain pools, once, which takes minutes; {hint}", err=True)
    with stages(quiet) as progress:
        plans, reading = plan_scenario(request, workspace(), progress, placement=placement)
    warn_unknown(reading.mixture)
    return plans


def _warn_context(options: Options) -> None:
    from sspcompile.api.settings import context_warning
    from sspcompile.model.dense import open_sizes

    if options.context is not None and (said := context_warning(options, open_sizes(options.source).config)):
        warn(said)


def _cost(scenario: str | None, mask: Path | None, as_json: bool, given: dict[str, Any]) -> None:
    from sspcompile.errors import CheckpointError, InputError

    if scenario is None or mask is not None:
        raise InputError("--cost is of a build.", hint="Give --scenario, and no --mask.")
    from sspcompile.api.cost import cost_of
    from sspcompile.api.nested import refuse_nested
    from sspcompile.api.refusing import refuse_hopeless, warnings_of
    from sspcompile.model.dense import open_dense

    request, placement = request_of(scenario, given), placement_in(given)
    dense = open_dense(request.options.source)
    if not dense.checkpoint.has_weights:
        raise CheckpointError(
            f"{dense.name} holds a configuration without weights, and --cost runs the model.",
            hint="Leave out --cost, or name a folder with weights.",
        )
    (refuse_nested if request.options.shares else refuse_hopeless)(request, dense)
    for warning in warnings_of(request, dense):
        warn(warning)
    found = cost_of(request, dense, workspace(), placement=placement)
    if as_json:
        click.echo(json.dumps(found.as_mapping(), indent=1))
        return
    from sspcompile.cli.tables import print_cost

    print_cost(found)
