"""`sspcompile build`: the whole way to an artifact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    GOING_ON,
    PLACE,
    build_options,
    json_option,
    overwrite_option,
    placement_in,
    placement_options,
    quiet_option,
    request_of,
    say_left_out,
    warn,
    warn_unknown,
    workspace,
)
from sspcompile.cli.sections import Sectioned

if TYPE_CHECKING:
    from sspcompile.model.dense import DenseModel
    from sspcompile.model.placement import Placement
    from sspcompile.request.request import Request

# What a build prints by itself; the whole report is in the files, or printed with --verbose.
SUMMARY = ("findings", "quality", "rounding")


@click.command(
    cls=Sectioned,
    short_help="Compile a scenario into a smaller model.",
    epilog="""\b
Examples:
  sspcompile build --scenario "A helpdesk for questions about chemistry"
  sspcompile build --scenario prompts.jsonl --model ./Qwen2.5-7B-Instruct --max-loss 0.03
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --size 0.8
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --keep 0.8     (heads alone)
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --max-memory 12GB --context 8192 --batch 4
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --max-latency 35ms --device cuda
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --size 0.9 --quantize int4
  sspcompile build --scenario support-desk --model ./Qwen2.5-7B-Instruct --size 0.9 --quantize q4_0   (for llama.cpp)
  sspcompile build --scenario finance-desk --strength 0.8 --layout uniform
  sspcompile build --scenario finance-desk --sweep size=0.7:1:0.1
  sspcompile build --scenario support-desk --model ./Llama-3.1-8B --memory 16GB
  sspcompile build --scenario support-desk --model ./Llama-3.1-8B --nested 1,0.9,0.8,0.7   (several sizes in one)
  torchrun --nproc-per-node 4 -m sspcompile.cli.main build --scenario support-desk --model ./Qwen2.5-7B-Instruct
""",
)
@build_options
@placement_options
@click.option("--out", "-o", type=PLACE, help="Artifact folder (default artifacts/NAME).")
@overwrite_option
@click.option(
    "--sweep",
    metavar="OPTION=VALUES",
    help="Build once per value (size=0.7:1:0.1, keep=0.5,0.75, criterion=kl,wanda), measure all, draw the frontier.",
)
@click.option("--no-bench", is_flag=True, help="Leave the speed of a sweep's builds unmeasured.")
@click.option("--dry-run", is_flag=True, help="Check request and model, print the resolved recipe, and stop.")
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Print the whole report instead of its summary.")
@quiet_option
def build(
    scenario: str | None,
    out: Path | None,
    overwrite: bool,
    sweep: str | None,
    no_bench: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Compile a scenario into a smaller model: choose heads and channels, repair, cut, prove, report.

    The first build of a model prepares its toolkit; later ones reuse it. Under torchrun the processes share the texts,
    one process per GPU; the first one writes.
    """
    if sweep is not None:
        _sweep(sweep, scenario, out, overwrite, not no_bench, dry_run, as_json, quiet, given)
        return
    request, placement = request_of(scenario, given), placement_in(given)
    from sspcompile.api.reads import refuse_output

    out = out or workspace().artifact(request.scenario.name)
    refuse_output(out, scenario, request.options, overwrite=overwrite)
    from sspcompile.api.refusing import refuse_hopeless
    from sspcompile.model.dense import open_dense

    dense = open_dense(request.options.source)
    if request.options.shares:
        _nested(request, dense, out, overwrite, dry_run, as_json, quiet, placement)
        return
    refuse_hopeless(request, dense, weights=not dry_run)
    _say_beforehand(request, dense)
    if dry_run:
        _print_recipe(request, as_json)
        return
    from sspcompile.api.build import build as run
    from sspcompile.api.build import take_part
    from sspcompile.api.unfinished import goes_on
    from sspcompile.cli.progress import stages
    from sspcompile.model import parallel

    with parallel.joined() as world, stages(quiet or not world.first) as progress:
        if not world.first:
            take_part(request, dense, workspace(), progress, placement=placement)
            return
        if not quiet and goes_on(request, dense, workspace()):
            click.echo(GOING_ON, err=True)
        outcome = run(request, dense, out, workspace(), progress, overwrite=overwrite, placement=placement)
    warn_unknown(outcome.selection.reading.mixture)
    from sspcompile.api.reporting import origin_of, report_of
    from sspcompile.cli.tables import print_report
    from sspcompile.embedded import EMBEDDED

    print_report(report_of(outcome), as_json=as_json, only=None if verbose else SUMMARY)
    click.echo(f"Written to {out}; the whole report is {out / 'report.html'}. Next: sspcompile bench", err=True)
    if request.options.model not in (None, EMBEDDED):  # whose folder is the package's own
        say_left_out(origin_of(outcome)["left_out"], quiet=quiet)


def _print_recipe(request: Request, as_json: bool) -> None:
    from sspcompile.request.prompts import counted
    from sspcompile.request.recipe import dump_recipe

    if request.scenario.prompts:
        click.echo(f"{request.scenario.name}: {counted(request.scenario.prompts)}", err=True)
    recipe = request.recipe()
    as_data = json.dumps(recipe.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
    click.echo(as_data if as_json else dump_recipe(recipe), nl=False)


def _say_beforehand(request: Request, dense: DenseModel) -> None:
    """What the user should know before the work starts."""
    from sspcompile.api.plan import few_heads
    from sspcompile.api.refusing import warnings_of

    for warning in warnings_of(request, dense):
        warn(warning)
    if not request.options.shares and (few := few_heads(request.options)):
        warn(few)


def _nested(
    request: Request,
    dense: DenseModel,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    placement: Placement,
) -> None:
    from sspcompile.api.nested import build_nested, refuse_nested
    from sspcompile.errors import InputError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun cannot share a nested build.", hint="Run it in one process.")
    refuse_nested(request, dense, weights=not dry_run)
    _say_beforehand(request, dense)
    if dry_run:
        _print_recipe(request, as_json)
        return
    from sspcompile.api.unfinished import goes_on
    from sspcompile.cli.progress import stages
    from sspcompile.cli.tables import print_members

    if not quiet and goes_on(request, dense, workspace()):
        click.echo(GOING_ON, err=True)
    with stages(quiet) as progress:
        done = build_nested(request, dense, out, workspace(), progress, overwrite=overwrite, placement=placement)
    print_members(out.name, done.nested, as_json=as_json)
    click.echo(
        f"Written to {out}. Next: sspcompile slice --from {out} --size {request.options.shares[-1]:g} --out DIR",
        err=True,
    )


def _sweep(
    text: str,
    scenario: str | None,
    out: Path | None,
    overwrite: bool,
    measured: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    given: dict[str, Any],
) -> None:
    from sspcompile.api.reads import typed_reads
    from sspcompile.api.refusing import refuse_hopeless
    from sspcompile.api.sweep import FRONTIER, read_axis, refuse_clash
    from sspcompile.api.sweep import sweep as run
    from sspcompile.checkpoint.replacing import refuse_read
    from sspcompile.errors import InputError
    from sspcompile.model.dense import open_dense

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun cannot share a sweep.", hint="Run it in one process, or build value by value.")
    axis, placement = read_axis(text), placement_in(given)
    refuse_clash(axis, given)
    requests = [request_of(scenario, given | {axis.option: axis.value(value)}) for value in axis.values]
    out = out or workspace().artifact(f"{requests[0].scenario.name}-sweep")
    reads = typed_reads(scenario, requests[0].options)
    for name in (FRONTIER, *(f"{axis.option}-{value}" for value in axis.values)):
        refuse_read(out / name, reads)
    dense = open_dense(requests[0].options.source)
    for request in requests:
        refuse_hopeless(request, dense, weights=not dry_run)
    if dry_run:
        click.echo("\n".join(str(out / f"{axis.option}-{value}") for value in axis.values))
        return
    from sspcompile.cli.progress import stages

    with stages(quiet) as progress:
        points = run(
            axis,
            requests,
            dense,
            out,
            workspace(),
            progress,
            overwrite=overwrite,
            measured=measured,
            placement=placement,
        )
    from sspcompile.report.comparison import frontier_page, render_points

    if as_json:
        click.echo(render_points(points), nl=False)
        return
    from rich.console import Console

    from sspcompile.report.text import render_text

    render_text(frontier_page(points), Console())
    click.echo(f"Written to {out}; the frontier is {out / FRONTIER / 'frontier.html'}.", err=True)
