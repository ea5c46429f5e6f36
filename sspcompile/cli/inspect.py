"""`sspcompile inspect`: look at a mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sspcompile.cli.options import PLACE, json_option, workspace

if TYPE_CHECKING:
    from sspcompile.api.arguments import Named


@click.command(
    short_help="Show the mask of an artifact.",
    epilog="""\b
Examples:
  sspcompile inspect
  sspcompile inspect artifacts/chemistry-helpdesk --svg mask.svg
""",
)
@click.argument("artifact", required=False)
@click.option("--svg", type=PLACE, metavar="FILE", help="Also write the heat map to FILE.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@json_option
def inspect(artifact: str | None, svg: Path | None, overwrite: bool, as_json: bool) -> None:
    """Print the mask of an artifact as a table of layers, heads and channels; without ARTIFACT, of the last build.

    Of a nested artifact, print its members and what each costs.
    """
    from sspcompile.api.arguments import demand, named
    from sspcompile.slicing.mask import dump_mask, load_mask
    from sspcompile.workspace import MASK

    found = demand(named(artifact, workspace()), "build", "cut", "nested", command="inspect")
    if found.kind == "nested":
        _members(found, svg, as_json)
        return
    mask = load_mask(found.folder / MASK)
    if svg is not None:
        from sspcompile.checkpoint.publish import write_atomically
        from sspcompile.report.heads import mask_section
        from sspcompile.report.svg import render_svg

        _refuse_picture(svg, found, overwrite=overwrite)
        write_atomically(svg, render_svg(mask_section(mask)))
        click.echo(f"Heat map written to {svg}", err=True)
    if as_json:
        click.echo(dump_mask(mask), nl=False)
        return
    from sspcompile.cli.tables import print_mask

    print_mask(mask)


def _refuse_picture(svg: Path, found: Named, *, overwrite: bool) -> None:
    """Raise InputError or OutputExistsError for a place where no picture belongs: a file of the artifact, whose
    checksums its manifest holds, or one of another kind.
    """
    from sspcompile.checkpoint.replacing import refuse_read
    from sspcompile.errors import InputError, OutputExistsError

    if svg.is_dir() or not svg.parent.is_dir():
        raise InputError(f"{svg} does not lie in an existing folder.", hint="Give --svg another file.")
    refuse_read(svg, found.reads, option="--svg")
    if svg.exists() and svg.suffix.lower() != ".svg":
        raise OutputExistsError(f"{svg} is not an .svg file, and is kept.", hint="Give --svg another file.")
    if svg.exists() and not overwrite:
        raise OutputExistsError(f"{svg} exists and is kept.", hint="Give --overwrite, or another file.")


def _members(found: Named, svg: Path | None, as_json: bool) -> None:
    from sspcompile.cli.tables import print_members
    from sspcompile.errors import InputError
    from sspcompile.nested.index import read_nested
    from sspcompile.report.members import FRONTIER

    if svg is not None:
        raise InputError(
            f"{found.folder} holds several masks.",
            hint=f"Its picture is {found.folder / FRONTIER}.svg; masks/ has them.",
        )
    print_members(found.name, read_nested(found.folder), as_json=as_json)
