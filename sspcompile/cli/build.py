"""`sspcompile build`: the whole way to an artifact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from sspcompile.cli.options import (
    build_options,
    here,
    json_option,
    overwrite_option,
    quiet_option,
    refuse_hopeless,
    request,
    say_left_out,
    warn_unknown,
)

# What a build prints by itself; the whole report is in the files, or printed with --verbose.
SUMMARY = ("verdict", "quality", "sizes")


@click.command(
    short_help="Compile a scenario into a smaller model.",
    epilog="""\b
Examples:
  sspcompile build --scenario "A helpdesk for questions about chemistry"
  sspcompile build --scenario prompts.jsonl --model ./Qwen2.5-7B-Instruct --keep 0.6
  sspcompile build --scenario finance-desk --strength 0.8 --layout uniform
  sspcompile build --scenario finance-desk --sweep keep=0.25:1:0.125
""",
)
@build_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Artifact folder (default artifacts/NAME).")
@overwrite_option
@click.option(
    "--sweep",
    metavar="OPTION=VALUES",
    help="Build once per value (keep=0.25:1:0.125, criterion=kl,wanda), measure all, draw the frontier.",
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
    """Compile a scenario into a smaller model: choose heads, repair, cut, prove, report.

    The first build of a model prepares its toolkit; later ones reuse it.
    """
    if sweep is not None:
        _sweep(sweep, scenario, out, overwrite, not no_bench, dry_run, as_json, quiet, given)
        return
    read, options = request(scenario, given)
    from sspcompile.checkpoint.publish import refuse_existing
    from sspcompile.request.recipe import dump_recipe
    from sspcompile.workspace import Workspace

    workspace = Workspace(here())
    out = out or workspace.artifact(read.name)
    refuse_existing(out, overwrite=overwrite)
    from sspcompile.model.dense import open_dense

    subject = open_dense(options.model)
    refuse_hopeless(read, subject, options)
    if dry_run:
        as_data = json.dumps(options.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
        click.echo(as_data if as_json else dump_recipe(options), nl=False)
        return
    from sspcompile.api.building import build as run
    from sspcompile.cli.progress import stages

    with stages(quiet) as progress:
        outcome = run(read, options, subject, out, workspace, progress, overwrite=overwrite)
    warn_unknown(outcome.compiled.mixture)
    from sspcompile.api.reporting import origin_of, report_of
    from sspcompile.checkpoint.locate import EMBEDDED
    from sspcompile.cli.tables import print_report

    print_report(report_of(outcome), as_json=as_json, only=None if verbose else SUMMARY)
    click.echo(f"Written to {out}; the whole report is {out / 'report.html'}. Next: sspcompile bench", err=True)
    if options.model not in (None, EMBEDDED):  # whose folder is the package's own
        say_left_out(origin_of(outcome)["left_out"], quiet=quiet)


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
    from sspcompile.api.sweeping import FRONTIER, read_axis
    from sspcompile.api.sweeping import sweep as run
    from sspcompile.errors import InputError
    from sspcompile.model.dense import open_dense
    from sspcompile.workspace import Workspace

    axis = read_axis(text)
    clash = next(
        (n for n in ("keep", "strength") if given.get(n) is not None and axis.option in ("keep", "strength")),
        axis.option if given.get(axis.option) is not None else None,
    )
    if clash:
        raise InputError(f"--{clash} and --sweep {axis.option} exclude each other.", hint="Leave one of them out.")
    requests = [request(scenario, given | {axis.option: axis.value(value)}) for value in axis.values]
    workspace = Workspace(here())
    out = out or workspace.artifact(f"{requests[0][0].name}-sweep")
    subject = open_dense(requests[0][1].model)
    for read, options in requests:
        refuse_hopeless(read, subject, options)
    if dry_run:
        click.echo("\n".join(str(out / f"{axis.option}-{value}") for value in axis.values))
        return
    from sspcompile.cli.progress import stages

    with stages(quiet) as progress:
        points = run(
            axis,
            requests,
            subject,
            out,
            workspace,
            os.cpu_count() or 1,
            progress,
            overwrite=overwrite,
            measured=measured,
        )
    from sspcompile.report.points import frontier_page, render_points

    if as_json:
        click.echo(render_points(points), nl=False)
        return
    from rich.console import Console

    from sspcompile.report.text import render_text

    render_text(frontier_page(points), Console())
    click.echo(f"Written to {out}; the frontier is {out / FRONTIER / 'frontier.html'}.", err=True)
