"""`sspcompile bench`: the dense model against the sliced one."""

from __future__ import annotations

import json

import click

from sspcompile.cli.options import here, json_option, model_option, quiet_option


@click.command(
    short_help="Measure an artifact against its dense model.",
    epilog="""\b
Examples:
  sspcompile bench --quick
  sspcompile bench artifacts/chemistry-helpdesk --prompt-tokens 512 --new-tokens 64 --batch 8
"""
)
@click.argument("artifact", required=False)
@model_option
@click.option("--quick", is_flag=True, help="Few tokens and repeats: seconds instead of minutes on a small model.")
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="Tokens of each prompt.")
@click.option("--new-tokens", type=click.IntRange(1), metavar="N", help="Tokens decoded after each prompt.")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences at once.")
@click.option("--repeats", type=click.IntRange(2), metavar="N", help="Counted trials of each contender.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of each contender (all cores).")
@json_option
@quiet_option
def bench(
    artifact: str | None, model: str | None, quick: bool, as_json: bool, quiet: bool, **sizes: int | None
) -> None:
    """Measure prefill, decode, memory and KV bytes of an artifact against its dense model, and write the report.

    Each contender runs in a process of its own, in alternation, with equal threads; every sample is kept. Without
    ARTIFACT, the last build is measured.
    """
    from sspcompile.cli.progress import stages
    from sspcompile.pipeline.benching import bench as run
    from sspcompile.workspace import Workspace

    folder = Workspace(here()).find(artifact)
    with stages(quiet) as progress:
        result = run(folder, model, quick=quick, sizes=sizes, progress=progress)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=1))
        return
    from sspcompile.cli.tables import print_report
    from sspcompile.report.json import read_report
    from sspcompile.workspace import REPORT

    print_report(read_report(folder / REPORT), only=("verdict", "latency"))
    click.echo(f"Report: {folder / 'report.html'}", err=True)
