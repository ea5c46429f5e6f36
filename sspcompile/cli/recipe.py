"""`sspcompile recipe`: the recipes that ship, and the check of one's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from sspcompile.cli.options import PLACE, json_option


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


@recipe.command(
    epilog="\b\nExamples:\n  sspcompile recipe validate mine.yaml\n  sspcompile recipe validate our-pools/ --json"
)
@click.argument("file", type=PLACE)
@json_option
def validate(file: Path, as_json: bool) -> None:
    """Check a recipe, a domain pool, or a folder of them (FILE); all problems are named at once.

    Of a recipe that is all that a build would refuse before it looks at a model. Of a pool that is also: prompts that
    nearly repeat others, a first word, an end or a layout that gives it away, sentences of the embedded model's
    language, too few prompts, and prompts of one length. Exits with 2 where a problem was found.
    """
    from sspcompile.api.validate import validate as check
    from sspcompile.errors import InputError, RecipeError

    found = check(file)
    if as_json:
        problems = [asdict(problem) for problem in found.problems]
        click.echo(json.dumps({"valid": not problems, "files": found.files, "problems": problems}, indent=1))
    elif not found.problems:
        for name, stated in found.files.items():
            click.echo(f"{name}: valid ({stated})")
    elif list(found.files.values()) == [None]:  # a recipe or pool that cannot be read is refused as it is elsewhere
        raise RecipeError(str(file), [problem.said for problem in found.problems])
    else:
        for problem in found.problems:
            click.echo(f"{problem.file}: {problem.said}")
    if found.problems:
        count, wrong = len(found.problems), len({problem.file for problem in found.problems})
        of_pools = {problem.file for problem in found.problems} - set(map(str, found.recipes))
        raise InputError(
            f"{count} {'problem' if count == 1 else 'problems'}, in {wrong} of {len(found.files)} files read.",
            hint="recipes/README.md says what a pool should be like." if of_pools else RecipeError.EXAMPLE,
        )
