"""`recipe validate`: all that a build would refuse of recipes and pools before it looks at a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sspcompile.criteria import criterion
from sspcompile.embedded import EMBEDDED
from sspcompile.errors import InputError, RecipeError
from sspcompile.families import FAMILIES
from sspcompile.request.documents import Document, Place, explain, read_yaml
from sspcompile.request.options import AUTO, LIMITS, NAMES, Options, clashing
from sspcompile.request.poolcheck import Checked, Problem, check
from sspcompile.request.pools import pools_of
from sspcompile.request.protecting import demand_protected
from sspcompile.request.scenario import read_prompts

# A recipe that names no model may be of the embedded one or of another; their pools differ.
ANY_MODELS = (EMBEDDED, "a model")
# The options that decide which domains there are.
OF_POOLS = ("pools", "axes", "without", "protect")

Wrong = tuple[Place, str]


def validate(path: Path) -> Checked:
    """Check a recipe, a pool, or a folder of them; `check` says what is held against pools. Raises InputError where
    there is nothing to check."""
    found = check(path)
    more = [
        Problem(str(file), "setting", f"{document.where(place)}: {said.rstrip('.')}")
        for file in found.recipes
        for document in [read_yaml(file)]
        for place, said in _wrong(file, document)
    ]
    return Checked(found.files, (*found.problems, *more), found.recipes)


def _wrong(file: Path, document: Document) -> Iterator[Wrong]:
    """What is wrong with a recipe beyond the form of its keys; options of a wrong form are left out here."""
    given, scenario = _rightly_formed(document.value), document.value.get("scenario")
    scenario = scenario if isinstance(scenario, Mapping) else {}
    yield from _clashes(dict(given))
    if isinstance(name := given.get("criterion", AUTO), str) and name != AUTO:
        yield from _refused(("criterion",), lambda: criterion(name))
    if (host := given.get("host", AUTO)) not in (AUTO, *FAMILIES):
        yield ("host",), f"no family is called {host!r}; known: {AUTO}, {', '.join(FAMILIES)}"
    yield from _wrong_domains(given, scenario.get("domains"))
    prompts_file = scenario.get("prompts_file")
    if isinstance(prompts_file, str):
        yield from _refused(("scenario", "prompts_file"), lambda: read_prompts(file.parent / prompts_file))
    if given.get("importance_from") == "prompts" and not (prompts_file or scenario.get("prompts")):
        yield ("importance_from",), "prompts needs prompts, and the scenario has none of its own; give auto or domains"


def _rightly_formed(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: raw[name] for name in NAMES if raw.get(name) is not None}
    try:
        Options.model_validate(given)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            given.pop(str(one["loc"][0]) if one["loc"] else "", None)
    return given


def _clashes(given: dict[str, Any]) -> Iterator[Wrong]:
    """Options that do not stand together, one clash after the other: pydantic stops at the first."""
    if clashing([name for name in LIMITS if name in given]):  # the form of a recipe says so already
        given = {name: value for name, value in given.items() if name not in LIMITS}
    while given:
        try:
            Options.model_validate(given)
            return
        except ValidationError as error:
            (problem,) = error.errors(include_url=False)
        said = explain(problem, Options)
        first = next((word for word in re.findall(r"\w+", said) if word in given), None)
        yield () if first is None else (first,), said
        if first is None:
            return
        del given[first]


def _wrong_domains(given: Mapping[str, Any], domains: object) -> Iterator[Wrong]:
    """Pools that cannot be read, and domains that none of them has: what is wrong for every model that may be meant."""
    asked = {name: given[name] for name in OF_POOLS if name in given}
    named = [str(name) for name in domains] if isinstance(domains, Mapping) else []
    models = (given["model"],) if "model" in given else ANY_MODELS
    found = [dict(_of_model(Options(model=model, **asked), named)) for model in models]
    yield from ((place, said) for place, said in found[-1].items() if all(place in one for one in found))


def _of_model(options: Options, named: list[str]) -> Iterator[Wrong]:
    try:
        pools = pools_of(options)
    except RecipeError as error:
        yield ("pools",), f"{options.pools}: {'; '.join(error.problems)}"
        return
    except InputError as error:
        yield ("axes" if "--axes" in error.message else "pools",), str(error)
        return
    yield from _refused(("protect",), lambda: demand_protected(options))
    known = [pool.name for pool in pools.candidates]
    for name in named:
        if name not in known:
            yield ("scenario", "domains", name), f"unknown domain {name!r}; known: {', '.join(known)}"


def _refused(place: Place, demand: Callable[[], object]) -> Iterator[Wrong]:
    try:
        demand()
    except InputError as error:
        yield place, str(error)
