"""`sspcompile recipe`: the recipes that ship, and the check of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sspcompile.cli.options import json_option


@click.group(epilog="\b\nExamples:\n  sspcompile recipe ls\n  sspcompile recipe show finance-desk > mine.yaml")
def recipe() -> None:
    """List, show and validate scenario recipes."""


@recipe.command("ls", epilog="\b\nExample:\n  sspcompile recipe ls")
@json_option
def ls(as_json: bool) -> None:
    """List the recipes that ship with the package."""
    from sspcompile.request.recipe import load_recipe, shipped_recipes

    recipes = {path.stem: load_recipe(path) for path in shipped_recipes()}
    if as_json:
        click.echo(json.dumps({name: recipe.description for name, recipe in recipes.items()}, indent=1))
        return
    for name, recipe in recipes.items():
        click.echo(f"{name:24} {recipe.description}" + (" (embedded model)" if recipe.model else ""))


@recipe.command(epilog="\b\nExample:\n  sspcompile recipe show finance-desk > mine.yaml")
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe; a good start for one of your own."""
    from sspcompile.errors import InputError
    from sspcompile.request.recipe import dump_recipe, find_recipe, load_recipe, shipped_recipes
    from sspcompile.request.scenario import read_scenario

    path = find_recipe(name)
    if path is None:
        names = ", ".join(path.stem for path in shipped_recipes())
        raise InputError(f"There is no shipped recipe {name!r}.", hint=f"Shipped: {names}.")
    told = path.read_text("utf-8")
    if load_recipe(path).scenario.prompts_file:  # it lies beside the recipe, not beside a copy of it
        _, recipe = read_scenario(str(path))
        told = dump_recipe(recipe) if recipe is not None else told
    click.echo(told, nl=False)


@recipe.command(epilog="\b\nExample:\n  sspcompile recipe validate mine.yaml")
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a recipe file; all its errors are named at once."""
    from sspcompile.errors import InputError
    from sspcompile.request.recipe import load_recipe

    if not file.is_file():
        raise InputError(f"There is no file {file}.", hint="Name a recipe, a .yaml file.")
    click.echo(f"{file}: valid ({load_recipe(file).name})")
