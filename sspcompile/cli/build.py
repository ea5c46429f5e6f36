"""`sspcompile build`: the whole way to an artifact."""

from __future__ import annotations

import json
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
"""
)
@build_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Artifact folder (default artifacts/NAME).")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Check request and model, print the resolved recipe, and stop.")
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Print the whole report instead of its summary.")
@quiet_option
def build(
    scenario: str | None, out: Path | None, overwrite: bool, dry_run: bool, as_json: bool, verbose: bool, quiet: bool,
    **given: Any,
) -> None:
    """Compile a scenario into a smaller model: choose heads, repair, cut, prove, report.

    The first build of a model prepares its toolkit; later ones reuse it.
    """
    read, options = request(scenario, given)
    from sspcompile.checkpoint.publish import refuse_existing
    from sspcompile.recipe import dump_recipe
    from sspcompile.workspace import Workspace

    workspace = Workspace(here())
    out = out or workspace.artifact(read.name)
    refuse_existing(out, overwrite=overwrite)
    from sspcompile.pipeline.compiling import open_subject

    subject = open_subject(options.model)
    refuse_hopeless(read, subject, options)
    if dry_run:
        as_data = json.dumps(options.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
        click.echo(as_data if as_json else dump_recipe(options), nl=False)
        return
    from sspcompile.cli.progress import stages
    from sspcompile.pipeline.building import build as run

    with stages(quiet) as progress:
        outcome = run(read, options, subject, out, workspace, progress, overwrite=overwrite)
    warn_unknown(outcome.compiled.mixture)
    from sspcompile.cli.tables import print_report
    from sspcompile.pipeline.reporting import report_of

    print_report(report_of(outcome), as_json=as_json, only=None if verbose else SUMMARY)
    click.echo(f"Written to {out}; the whole report is {out / 'report.html'}. Next: sspcompile bench", err=True)
