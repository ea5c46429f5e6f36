"""A recipe: the scenario and the build options as one YAML file, checked with all its errors at once.

Precedence of build options: command line, environment (`SSPCOMPILE_KEEP`, ...), recipe, default.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from sspcompile.errors import RecipeError
from sspcompile.request.documents import (
    NAME_PATTERN,
    YAML_BYTES,
    Document,
    Text,
    dotted,
    explain,
    read_yaml,
    shown,
    validation_problems,
)
from sspcompile.request.domains import recipes_folder
from sspcompile.request.prompts import PromptField

SCENARIO_FORMS = ("text", "prompts", "prompts_file", "domains")
ENVIRONMENT_PREFIX = "SSPCOMPILE_"
# Leaves the choice to the build.
AUTO = "auto"
DEFAULTS: Mapping[str, Any] = {
    "layout": AUTO,
    "host": AUTO,
    "criterion": AUTO,
    "importance_from": AUTO,
    "repair": "least-squares",
    "granularity": "head",
    "without": (),
    "max_tokens": 512,
    "continuation_tokens": 16,
    "seed": 0,
}
DEFAULT_KEEP = 0.5
OPTIONS_HINT = "See `sspcompile build --help`; --keep lies in (0, 1], --strength in [0, 1]."

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What `--without` switches off, to see what it is worth: `axes` (no selection: every pool is a domain), `whitelist` (no
# head is kept by privilege), `mixing` (the top domain alone), `scenario` (all domains alike, whatever the scenario),
# `calibration` (probes at temperature 1).
Part = Literal["axes", "whitelist", "mixing", "scenario", "calibration"]
PARTS: tuple[Part, ...] = get_args(Part)


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Each part once, in the order of PARTS: equal requests are equal recipes."""
    return tuple(part for part in PARTS if part in parts)


class ScenarioSpec(BaseModel):
    """Exactly one description of a deployment. `prompts_file` is relative to the recipe's own folder."""

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


class Recipe(BaseModel):
    """A scenario with the options of its build; an option that is None is left to the next level of precedence.

    `keep`: kept query heads / all query heads, an upper bound. `strength`: how hard to cut, from 0 (keep all); it
    becomes a keep ratio once the breadth of the scenario is known. They exclude each other. `importance_from`: whether
    heads are scored by the domains' cached importance, on the scenario's own prompts, or by both where there are any.
    `without`: parts of the method that are switched off. `pools`: a folder of domain pools beside the shipped ones.
    `axes`: how many of all pools become domains; None for the shipped six and those of `pools`.
    `criterion`: what ranks the heads; `auto` takes the best of several by measurement (select/search.py), and
    `fisher-rounds` where nothing is measured. `granularity`: cut single heads, or whole key/value groups only.
    `host`: the family whose stock class loads a uniform cut; `auto` takes the model's own where that can hold it.
    `model`: a folder or a hub name, None for the embedded model. `continuation_tokens`: how many tokens the model
    writes after each prompt when heads are scored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    name: str = Field(pattern=NAME_PATTERN)
    description: Text
    scenario: ScenarioSpec
    model: Text | None = None
    keep: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    strength: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    layout: Literal["auto", "uniform", "per-layer"] | None = None
    host: str | None = Field(default=None, pattern=r"^[a-z0-9_]{1,40}$")
    pools: Text | None = None
    axes: int | None = Field(default=None, ge=2, le=1000)
    criterion: str | None = Field(default=None, pattern=NAME_PATTERN)
    granularity: Literal["head", "group"] | None = None
    importance_from: Literal["domains", "prompts", "auto"] | None = None
    repair: Literal["least-squares", "least-squares-mlp", "flap-bias", "none"] | None = None
    without: Annotated[tuple[Part, ...], AfterValidator(_in_order)] | None = Field(default=None, strict=False)
    max_tokens: int | None = Field(default=None, ge=8, le=131072)
    continuation_tokens: int | None = Field(default=None, ge=0, le=4096)
    seed: int | None = Field(default=None, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        problem = _budget_problem(self.model_dump(exclude_none=True))
        if problem:
            raise PydanticCustomError("exclusive", "{problem}", {"problem": problem})
        return self


NOT_OPTIONS = ("schema_version", "name", "description", "scenario")
OPTIONS = tuple(name for name in Recipe.model_fields if name not in NOT_OPTIONS)


def _form_problem(spec: Mapping[str, Any]) -> str | None:
    given = [form for form in SCENARIO_FORMS if spec.get(form) is not None]
    if len(given) != 1:
        return f"needs exactly one of {', '.join(SCENARIO_FORMS)}; it has {', '.join(given) or 'none'}"
    weights = spec.get("domains")
    numbers = isinstance(weights, Mapping) and all(isinstance(w, int | float) for w in weights.values())
    if numbers and not sum(weights.values()) > 0:
        return "needs at least one domain of positive weight"
    return None


def _budget_problem(options: Mapping[str, Any]) -> str | None:
    if options.get("keep") is not None and options.get("strength") is not None:
        return "keep and strength exclude each other; give one"
    return None


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
    spec = raw.get("scenario")
    relations = [
        (("scenario",), _form_problem(spec) if isinstance(spec, Mapping) else None),
        (("strength",), _budget_problem(raw)),
    ]
    found = [f"{document.where(place)}: {problem}" for place, problem in relations if problem]
    messages = {problem for _, problem in relations if problem}
    return [p for p in problems if p.split(": ", 1)[1] not in messages] + found


def shipped_recipes() -> tuple[Path, ...]:
    """The files of the recipes that ship with the package, sorted by name."""
    return tuple(sorted((recipes_folder() / "scenarios").glob("*.yaml")))


def find_recipe(name: str) -> Path | None:
    """The file of the shipped recipe `name`, or None."""
    return next((path for path in shipped_recipes() if path.stem == name), None)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal value."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 110
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json", exclude_none=True), stream)
    return stream.getvalue()


def resolve(recipe: Recipe | None, *, command_line: Mapping[str, Any], environment: Mapping[str, str]) -> Recipe:
    """The recipe with every build option settled; only `model` (the embedded one), `pools` and `axes` may stay None.

    `command_line` maps option names (`keep`, `max_tokens`, ...) to values; None means not given. Without a recipe
    it must also carry `name` and `scenario` (see `scenario.as_recipe` for the other way). Raises RecipeError that
    names every wrong value by the flag or the variable it came from.
    """
    levels = [
        ({k: v for k, v in command_line.items() if v is not None}, lambda name: "--" + name.replace("_", "-")),
        (_from_environment(environment), lambda name: ENVIRONMENT_PREFIX + name.upper()),
        (recipe.model_dump(exclude_none=True) if recipe else {}, lambda name: name),
        ({"schema_version": 1, "description": "given on the command line", **DEFAULTS}, lambda name: name),
    ]
    merged: dict[str, Any] = {}
    labels: dict[str, str] = {}
    problems = []
    for values, label in levels:
        if _budget_problem(values):
            problems.append(f"{label('keep')} and {label('strength')} exclude each other; give one")
        budget_settled = "keep" in merged or "strength" in merged
        for name, value in values.items():
            if name in merged or (budget_settled and name in ("keep", "strength")):
                continue
            merged[name], labels[name] = value, label(name)
    if "keep" not in merged and "strength" not in merged:
        merged["keep"] = DEFAULT_KEEP
    return _checked(merged, labels, problems)


def _checked(merged: Mapping[str, Any], labels: Mapping[str, str], problems: list[str]) -> Recipe:
    try:
        resolved = Recipe.model_validate(merged)
    except ValidationError as error:
        for e in error.errors(include_url=False):
            if e["type"] == "exclusive" and problems:
                continue
            head = labels.get(str(e["loc"][0]), str(e["loc"][0])) if e["loc"] else "options"
            place = dotted((head, *e["loc"][1:]))
            problems.append(f"{place}: {explain(e, Recipe)}")
    if problems:
        raise RecipeError("The build request", problems, hint=OPTIONS_HINT)
    return resolved


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The options that the environment sets. An empty variable counts as not set."""
    options: dict[str, Any] = {}
    problems = []
    for name in OPTIONS:
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = environment.get(variable, "").strip()
        if not text:
            continue
        kinds = get_args(Recipe.model_fields[name].annotation)
        number = next((kind for kind in (int, float) if kind in kinds), None)
        if any(get_origin(kind) in (tuple, Annotated) for kind in kinds):
            options[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            continue
        try:
            options[name] = number(text) if number else text
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            problems.append(f"{variable}: must be {kind}, not {shown(text)}")
    if problems:
        raise RecipeError("The environment", problems, hint=OPTIONS_HINT)
    return options
