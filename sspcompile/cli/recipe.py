"""`sspcompile recipe`: the recipes that ship, and the check of one's own."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def recipe() -> None:
    """List, show and validate scenario recipes."""


@recipe.command("ls")
def ls() -> None:
    """List the recipes that ship with the package."""
    from sspcompile.recipe import load_recipe, shipped_recipes

    for path in shipped_recipes():
        click.echo(f"{path.stem:28} {load_recipe(path).description}")


@recipe.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe; a good start for one of your own."""
    from sspcompile.errors import InputError
    from sspcompile.recipe import find_recipe, shipped_recipes

    path = find_recipe(name)
    if path is None:
        names = ", ".join(path.stem for path in shipped_recipes())
        raise InputError(f"There is no shipped recipe {name!r}.", hint=f"Shipped: {names}.")
    click.echo(path.read_text("utf-8"), nl=False)


@recipe.command()
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a recipe file; all its errors are named at once."""
    from sspcompile.errors import InputError
    from sspcompile.recipe import load_recipe

    if not file.is_file():
        raise InputError(f"There is no file {file}.", hint="Name a recipe, a .yaml file.")
    click.echo(f"{file}: valid ({load_recipe(file).name})")
