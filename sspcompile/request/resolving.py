"""Options from where people set them: the command line or keywords, the environment, a recipe, the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from sspcompile.errors import RecipeError
from sspcompile.request.documents import dotted, explain, plain, shown
from sspcompile.request.kinds import kind_of
from sspcompile.request.options import BUDGETS, LIMITS, NAMES, Options, clashing, exclusive, flag, variable

HINT = (
    "See `sspcompile build --help`; --size and --keep lie in (0, 1], --strength in [0, 1], --max-loss in (0, 1), "
    "--max-perplexity above 1."
)
SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def resolve(
    given: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    recipe: Mapping[str, Any] | None = None,
    call: Callable[[str], str] = flag,
) -> Options:
    """Options from what was `given` (the command line or keywords), the environment, a recipe, and the defaults.

    All map names of options to values; of `given`, None and an empty tuple mean "not given", and errors call its names
    as `call` does. Numbers may be NumPy's. Raises RecipeError that names every wrong value by where it came from.
    """
    sources: list[tuple[Mapping[str, Any], Callable[[str], str]]] = [
        ({name: value for name, value in plain(given).items() if value is not None and value != ()}, call),
        (from_environment(environment), variable),
        (recipe or {}, str),
    ]
    merged: dict[str, Any] = {}
    labels: dict[str, str] = {}
    problems = []
    for values, label in sources:
        budgets = [name for name in LIMITS if name in values]
        if clashing(budgets):
            problems.append(exclusive([label(name) for name in budgets]))
        settled = set(merged)
        if settled & set(BUDGETS):
            settled |= set(BUDGETS)
        if "model" in settled:  # a revision is of the model that it stands with
            settled.add("revision")
        for name, value in values.items():
            if name in settled:
                continue
            merged[name], labels[name] = value, label(name)
    return _checked(merged, labels, problems)


def _checked(merged: Mapping[str, Any], labels: Mapping[str, str], problems: list[str]) -> Options:
    try:
        options = Options.model_validate(merged)
    except ValidationError as error:
        for e in error.errors(include_url=False):
            if e["type"] == "exclusive" and problems:
                continue
            head = labels.get(str(e["loc"][0]), str(e["loc"][0])) if e["loc"] else "options"
            place = dotted((head, *e["loc"][1:]))
            problems.append(f"{place}: {explain(e, Options)}")
    if problems:
        raise RecipeError("The build request", problems, hint=HINT)
    return options


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The options that the environment sets. An empty variable counts as not set. Raises RecipeError."""
    found: dict[str, Any] = {}
    problems = []
    for name in NAMES:
        text = environment.get(variable(name), "").strip()
        if not text:
            continue
        kind = kind_of(name)
        if kind.multiple:
            found[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            continue
        if kind.switch:
            found[name] = SWITCHES.get(text.lower(), text)
            continue
        try:
            found[name] = kind.number(text) if kind.number else text
        except ValueError:
            wanted = "a whole number" if kind.number is int else "a number"
            problems.append(f"{variable(name)}: must be {wanted}, not {shown(text)}")
    if problems:
        raise RecipeError("The environment", problems, hint=HINT)
    return found
