"""A request: the scenario and the options of a build, complete. What comes out of it is decided by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sspcompile.errors import ScenarioError
from sspcompile.request.options import Options, flag, variable
from sspcompile.request.prompts import counted
from sspcompile.request.recipe import Recipe, ScenarioSpec, load_recipe
from sspcompile.request.resolving import from_environment, resolve
from sspcompile.request.scenario import Scenario, read_scenario, scenario_of

# An artifact's own recipe holds all prompts of a prompt file.
RECIPE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """A scenario and how its model is to be built. `description` says in words where the scenario came from.

    `outside`: the options that the environment or a recipe stated, and what stated each, for commands that mean
    something else by one of them.
    """

    scenario: Scenario
    options: Options
    description: str
    outside: Mapping[str, str] = field(default_factory=dict, compare=False)

    def recipe(self) -> Recipe:
        """The recipe that asks for just this, every option settled and every prompt written out."""
        scenario = self.scenario
        domains = dict(scenario.domains) if scenario.domains else None
        spec = ScenarioSpec(text=scenario.text, prompts=scenario.prompts or None, domains=domains)
        return Recipe(
            schema_version=1,
            name=scenario.name,
            description=self.description,
            scenario=spec,
            **self.options.model_dump(exclude_none=True),
        )


def read_request(
    scenario: str | Scenario | None,
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    call: Callable[[str], str] = flag,
) -> Request:
    """From what was typed to what a build works with.

    `scenario` is a sentence, a file of prompts, a data set of the hub, a recipe (file or shipped name), or a scenario
    that was read already.
    `given` maps names of options to values, None where nothing was said; errors call them as `call` does. Raises
    ScenarioError or RecipeError.
    """
    if scenario is None:
        raise ScenarioError(
            "No scenario was given.",
            hint='Type --scenario "A helpdesk for questions about chemistry", or see `sspcompile recipe ls`.',
        )
    read, recipe = (scenario, None) if isinstance(scenario, Scenario) else read_scenario(scenario)
    stated = recipe.options() if recipe is not None else {}
    options = resolve(given, environment=environment, recipe=stated, call=call)
    told = f"Read from {read.origin or 'a sentence'}" + (f": {counted(read.prompts)}." if read.prompts else ".")
    outside = {name: f"{name} of the recipe" for name in stated}
    outside |= {name: variable(name) for name in from_environment(environment)}
    return Request(read, options, recipe.description if recipe is not None else told, outside)


def built_request(path: Path) -> Request:
    """The request that an artifact was built from, read back from the recipe in its folder. Raises RecipeError."""
    recipe = load_recipe(path, limit=RECIPE_BYTES)
    return Request(scenario_of(recipe), Options.model_validate(recipe.options()), recipe.description)
