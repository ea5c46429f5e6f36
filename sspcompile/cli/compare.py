"""`sspcompile compare`: finished builds side by side."""

from __future__ import annotations

from pathlib import Path

import click

from sspcompile.cli.options import PLACE, json_option, overwrite_option, workspace


@click.command(
    short_help="Show finished builds side by side.",
    epilog="""\b
Examples:
  sspcompile compare keep-half keep-third
  sspcompile compare artifacts/uniform artifacts/per-layer --out ./comparison
  sspcompile compare keep-half keep-third --json
""",
)
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True)
@click.option("--out", "-o", type=PLACE, help="Also write it as JSON, Markdown and HTML there.")
@overwrite_option
@json_option
def compare(artifacts: tuple[str, ...], out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Print size, quality, speed and verdict of several artifacts, from their reports.

    Nothing is measured anew: run `sspcompile bench` on them first, together, so that their speeds compare.
    """
    from sspcompile.api.arguments import named
    from sspcompile.api.compare import compare as run
    from sspcompile.api.compare import write_comparison
    from sspcompile.report.comparison import comparison_page, render_points

    points = run(artifacts, workspace())
    reads = [named(one, workspace()).folder for one in artifacts]
    if out is not None:
        write_comparison(points, out, overwrite=overwrite, reads=reads)
    if as_json:
        click.echo(render_points(points), nl=False)
        return
    from rich.console import Console

    from sspcompile.report.text import render_text

    render_text(comparison_page(points), Console())
