"""A recipe: a scenario and the options of its build as one YAML file, checked with all its errors at once.

A recipe is partial: an option that it leaves out is left to the next level of precedence (command line, environment,
recipe, default). What a build works with is complete: `options.Options`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from sspcompile.embedded import SCENARIOS_DIR
from sspcompile.errors import RecipeError
from sspcompile.request.documents import NAME_PATTERN, YAML_BYTES, Document, Text, read_yaml, validation_problems
from sspcompile.request.domains import recipes_folder
from sspcompile.request.options import LIMITS, NAMES, Options, clashing, exclusive, shown_of
from sspcompile.request.prompts import PromptField

SCENARIO_FORMS = ("text", "prompts", "prompts_file")

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ScenarioSpec(BaseModel):
    """One description of a deployment at most, and the weights of its `domains` where the recipe states them, instead
    of a description or beside it. `prompts_file` is relative to the recipe's own folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Text | None = None
    prompts: tuple[PromptField, ...] | None = Field(default=None, min_length=1, strict=False)
    prompts_file: Text | None = None
    domains: dict[str, Weight] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ScenarioSpec:
        problem = _form_problem(self.model_dump(exclude_none=True))
        if problem:
            raise PydanticCustomError("exclusive", "{problem}", {"problem": problem})
        return self


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    name: str = Field(pattern=NAME_PATTERN)
    description: Text
    scenario: ScenarioSpec


def _open(name: str) -> tuple[Any, Any]:
    """The definition of an option, with None for "left open" as its default."""
    field: FieldInfo = Options.model_fields[name]
    annotation: Any = Annotated[(field.annotation, *field.metadata)]
    return annotation | None, Field(default=None, description=shown_of(name).help, strict=None)


_Open = create_model("_Open", __base__=_Frame, **{name: _open(name) for name in NAMES})  # type: ignore[call-overload]


class Recipe(_Open):  # type: ignore[misc, valid-type]  # made of `Options`, so that every option is written once
    """A scenario with the options of its build; an option that is None is left open."""

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        given = _budgets(self.options())
        if clashing(given):
            raise PydanticCustomError("exclusive", "{problem}", {"problem": exclusive(given)})
        return self

    def options(self) -> dict[str, Any]:
        """The options that the recipe settles."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}


def _form_problem(spec: Mapping[str, Any]) -> str | None:
    given = [form for form in SCENARIO_FORMS if spec.get(form) is not None]
    weights = spec.get("domains")
    if len(given) > 1 or not (given or weights is not None):
        return f"needs text, prompts or prompts_file, domains, or one with domains; it has {', '.join(given) or 'none'}"
    values = list(weights.values()) if isinstance(weights, Mapping) else []
    numbers = isinstance(weights, Mapping) and all(isinstance(w, int | float) for w in values)
    if numbers and not sum(values) > 0:
        return "needs at least one domain of positive weight"
    return None


def _budgets(options: Mapping[str, Any]) -> list[str]:
    return [name for name in LIMITS if options.get(name) is not None]


def load_recipe(path: Path, *, limit: int = YAML_BYTES) -> Recipe:
    """Read and check a recipe file. Raises RecipeError that lists every error with its place and line."""
    document = read_yaml(path, limit=limit)
    problems = _recipe_problems(document)
    if problems:
        raise RecipeError(str(path), problems)
    return Recipe.model_validate(document.value)


def _recipe_problems(document: Document) -> list[str]:
    """pydantic checks relations between keys only once every key is right, so they are checked here as well."""
    problems = validation_problems(Recipe, document)
    raw = document.value
    spec, budgets = raw.get("scenario"), _budgets(raw)
    relations = [
        (("scenario",), _form_problem(spec) if isinstance(spec, Mapping) else None),
        ((budgets[-1] if budgets else "keep",), exclusive(budgets) if clashing(budgets) else None),
    ]
    found = [f"{document.where(place)}: {problem}" for place, problem in relations if problem]
    messages = {problem for _, problem in relations if problem}
    return [p for p in problems if p.split(": ", 1)[1] not in messages] + found


def shipped_recipes() -> tuple[Path, ...]:
    """The files of the recipes that ship with the package, by name, those for the embedded model last."""
    own, toy = (recipes_folder() / "scenarios").glob("*.yaml"), SCENARIOS_DIR.glob("*.yaml")
    return (*sorted(own), *sorted(toy))


def find_recipe(name: str) -> Path | None:
    """The file of the shipped recipe `name`, or None."""
    return next((path for path in shipped_recipes() if path.stem == name), None)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal value."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    # Where ruamel.yaml folds a quoted line behind a tab, a space comes into the text.
    yaml.width = 1 << 30
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json", exclude_none=True), stream)
    return stream.getvalue()
