"""Options that several commands share, and how they become a resolved recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sspcompile.criteria import CRITERIA

if TYPE_CHECKING:
    from sspcompile.pipeline.compiling import Subject
    from sspcompile.recipe import Recipe
    from sspcompile.scenario import Scenario

Command = TypeVar("Command", bound=Callable[..., Any])
BUILD_OPTIONS = (
    "model", "keep", "strength", "layout", "criterion", "repair", "max_tokens", "continuation_tokens", "seed"
)  # fmt: skip

CRITERIA_HELP = f"{', '.join(list(CRITERIA)[:5])}, ...; `sspcompile criteria` lists all {len(CRITERIA)}."

scenario_option = click.option(
    "--scenario", "-s", metavar="SCENARIO",
    help="A recipe (file or shipped name), a sentence, or a file of prompts (.txt, .jsonl).",
)  # fmt: skip
model_option = click.option(
    "--model", "-m", metavar="MODEL", help="A model folder or a hub name; the embedded model by default."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")


def build_options(command: Command) -> Command:
    """The options of `build` that settle what is compiled; `plan` takes the same."""
    for option in reversed(
        (
            scenario_option,
            model_option,
            click.option(
                "--keep", type=float, metavar="RATIO",
                help="Keep at most this share of the heads, above 0 and up to 1; 0.5 by default.",
            ),
            click.option(
                "--strength", type=float, metavar="S",
                help="In [0, 1], instead of --keep: the budget follows from it and from the scenario's breadth.",
            ),
            # No click.Choice: the recipe room checks these, all at once with whatever else is wrong.
            click.option(
                "--layout", metavar="[auto|uniform|per-layer]",
                help="Head counts equal in every layer, or not; auto (default) measures both.",
            ),
            click.option("--criterion", metavar="NAME", help=f"Score of the heads (fisher): {CRITERIA_HELP}"),
            click.option(
                "--repair", metavar="[least-squares|none]", help="Refit o_proj to what is left (least-squares)."
            ),
            click.option("--max-tokens", type=int, metavar="N", help="Read at most N tokens of each text (512)."),
            click.option(
                "--continuation-tokens", type=int, metavar="N",
                help="Let the dense model continue each text by N tokens (16).",
            ),
            click.option("--seed", type=int, metavar="N", help="Seed of every random choice (0)."),
        )
    ):
        command = option(command)
    return command


def request(scenario: str | None, given: Mapping[str, Any]) -> tuple[Scenario, Recipe]:
    """The scenario and the resolved recipe of a build or plan. Raises ScenarioError or RecipeError."""
    from sspcompile.errors import ScenarioError
    from sspcompile.recipe import resolve
    from sspcompile.scenario import as_recipe, read_scenario

    if scenario is None:
        raise ScenarioError(
            "No scenario was given.",
            hint='Type --scenario "A helpdesk for questions about chemistry", or see `sspcompile recipe ls`.',
        )
    read, recipe = read_scenario(scenario)
    command_line = {name: given[name] for name in BUILD_OPTIONS}
    return read, resolve(recipe or as_recipe(read), command_line=command_line, environment=os.environ)


def refuse_hopeless(subject: Subject, options: Recipe) -> None:
    """Refuse before any heavy work what would be refused after it. Raises InputError or BudgetError."""
    import numpy as np

    from sspcompile.compile.layouts import choose
    from sspcompile.criteria import criterion

    criterion(options.criterion or "")
    if options.keep is not None:
        g = subject.checkpoint.geometry
        # Whether a budget is feasible follows from the counts alone, whatever the scores are.
        choose(np.ones((g.layers, g.heads)), g.kv_heads, options.keep, "per-layer")


def here() -> Path:
    """The folder that holds `artifacts` and `exported`: SSPCOMPILE_HOME, or the current folder."""
    return Path(os.environ.get("SSPCOMPILE_HOME") or ".")
