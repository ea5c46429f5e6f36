"""What is written from the definition of the options: the keywords of the Python API, a page, and the recipe's schema.

python -m sspcompile.request.page      (from the repository's top, as `make generated` does)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sspcompile.request.kinds import kind_of
from sspcompile.request.options import NAMES, default_of, flag, shown_of, variable
from sspcompile.request.recipe import Recipe

POSITIONAL = "model"
KEYWORDS, PAGE, SCHEMA = "sspcompile/request/keywords.py", "docs/options.md", "docs/schemas/recipe.schema.json"
# What Python may give beside text (`api.given`).
TAKEN = {"pools": "os.PathLike[str]", "nested": "Sequence[float]"}


def files() -> Mapping[str, str]:
    """Path from the repository's top -> content."""
    return {KEYWORDS: keywords(), PAGE: page(), SCHEMA: schema()}


def keywords() -> str:
    """The module with the types of the keyword arguments; the model is an argument by itself."""
    lines = [f"    {name}: {_type_of(name)}" for name in NAMES if name != POSITIONAL]
    return (
        '"""The options of a build as keyword arguments. Written by `make generated`; edit options.py instead."""\n\n'
        "from __future__ import annotations\n\n"
        "import os\n"
        "from collections.abc import Mapping, Sequence\n"
        "from typing import Literal, TypedDict\n\n\n"
        "class Keywords(TypedDict, total=False):\n"
        '    """Every option of a build; `docs/options.md` says what each one does."""\n\n' + "\n".join(lines) + "\n"
    )


def _type_of(name: str) -> str:
    kind = kind_of(name)
    if name in TAKEN:
        return f"str | {TAKEN[name]} | None"
    if kind.pairs:
        return "Mapping[str, float] | None"
    choices = ", ".join(f'"{choice}"' for choice in kind.choices)
    words = "int | str" if kind.amount else "str"
    plain = "bool" if kind.switch else kind.number.__name__ if kind.number else words
    one = f"Literal[{choices}]" if choices else plain
    return f"Sequence[{one}]" if kind.multiple else f"{one} | None"


def page() -> str:
    """docs/options.md"""
    head = (
        "# Options of a build\n\n"
        "`build` and `plan` take them as flags, recipes as keys, `sspcompile.build` and `sspcompile.plan` as keywords, "
        "and the environment as variables. The command line goes before the environment, the environment before the "
        "recipe, the recipe before the default. This page is generated from `sspcompile/request/options.py`; the "
        "recipe's JSON schema is [schemas/recipe.schema.json](schemas/recipe.schema.json).\n\n"
        "| flag | recipe key and keyword | variable | values | default | what it does |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    for name in NAMES:
        shown, kind, default = shown_of(name), kind_of(name), default_of(name)
        values = ", ".join(f"`{choice}`" for choice in kind.choices) or ("" if kind.switch else shown.metavar)
        stated = "" if isinstance(default, bool) or default in (None, ()) else f"`{default}`"
        yield f"| `{flag(name)}` | `{name}` | `{variable(name)}` | {values} | {stated} | {shown.help} |"


def schema() -> str:
    """The JSON schema of a recipe file, for editors."""
    found: dict[str, Any] = Recipe.model_json_schema()
    return json.dumps(found, indent=1) + "\n"


def main() -> None:
    """Write the files below the current folder."""
    for place, content in files().items():
        Path(place).write_text(content, "utf-8")


if __name__ == "__main__":
    main()
