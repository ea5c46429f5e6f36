"""What Python users give, in the types that the rooms below take: checked once, before anything is done with it.

Numbers may be NumPy's, paths may be `Path`s. What is neither right nor plainly meant is an InputError that names the
argument.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sspcompile.errors import InputError
from sspcompile.request.documents import plain, shown
from sspcompile.request.scenario import Scenario, of_prompts

Place = str | os.PathLike[str]
# A sentence, a recipe (file or shipped name), a file of prompts, or the prompts themselves: texts, or mappings like the
# lines of a .jsonl file ({"prompt": ..., "answer": ...}, {"messages": [...]}).
ScenarioLike = str | os.PathLike[str] | Iterable[str | Mapping[str, object]] | Scenario


def text_of(place: Place | None, name: str = "model") -> str | None:
    """A place as text, None for None."""
    return None if place is None else _told(place, name)


def path_of(place: Place, name: str) -> Path:
    """A place as a path."""
    return Path(_told(place, name))


def _told(place: Place, name: str) -> str:
    found = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(found, str):
        raise InputError(f"{name} is {shown(place)}, and neither text nor a path.", hint='Give one, as "./folder".')
    return found


def paths_of(places: Place | Sequence[Place], name: str) -> list[Path]:
    """One place, or several."""
    several = [places] if isinstance(places, str | os.PathLike) or not isinstance(places, Iterable) else places
    return [path_of(place, name) for place in several]


def whole_of(value: Any, name: str, *, least: int = 1, most: int | None = None) -> int | None:
    """A whole number in these bounds, None for None."""
    found = plain(value)
    if found is None:
        return None
    if type(found) is not int or found < least or (most is not None and found > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {shown(found)}.", hint=f"Give a whole number, {bounds}.")
    return found


def number_of(value: Any, name: str) -> float | None:
    """A finite number, None for None."""
    found = plain(value)
    if found is None:
        return None
    if type(found) not in (int, float) or not math.isfinite(found):
        raise InputError(f"{name} is {shown(found)}.", hint="Give a number, as 0.5.")
    return float(found)


def word_of(value: Any, name: str) -> str | None:
    """Text, None for None."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}.", hint="Give text.")
    return value


def scenario_of(given: ScenarioLike | None) -> str | Scenario | None:
    """A scenario as it is read from; prompts are read here. Raises ScenarioError."""
    if given is None or isinstance(given, str | Scenario):
        return given
    if isinstance(given, os.PathLike):
        return text_of(given, "scenario")
    if not isinstance(given, Iterable):
        raise InputError(
            f"scenario is {shown(given)}, and neither text nor prompts.",
            hint="Give a sentence, the path of a file of prompts or of a recipe, or a list of prompts.",
        )
    return of_prompts(given)


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a build as their definition takes them: paths as text, and the sizes of `nested` too."""
    return {name: _option(name, plain(value)) for name, value in given.items()}


def _option(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return text_of(value, name)
    if name == "nested" and isinstance(value, list | tuple | float | int) and not isinstance(value, bool):
        shares = value if isinstance(value, list | tuple) else [value]
        return ",".join(map(str, shares))
    return value
