"""Domain pools: for each domain a list of prompts without answers, and sentences that describe a deployment in it.

Pools are input-only: nothing in them is a label. They ship with the package under `recipes/domains`; the pools in
`recipes/domains/outside` belong to no axis: real other text, which teaches what none of the domains is. The embedded
model has pools of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sspcompile.errors import RecipeError
from sspcompile.request.documents import NAME_PATTERN, Document, Text, read_yaml, validation_problems


@dataclass(frozen=True)
class DomainPool:
    """One domain. `prompts` are what its users type; `descriptions` are how its owner would describe a deployment."""

    name: str
    description: str
    descriptions: tuple[str, ...]
    prompts: tuple[str, ...]


class PoolFile(BaseModel):
    """The YAML form of a pool."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    name: str = Field(pattern=NAME_PATTERN)
    description: Text
    descriptions: tuple[Text, ...] = Field(min_length=1, strict=False)
    prompts: tuple[Text, ...] = Field(min_length=1, strict=False)


def recipes_folder() -> Path:
    """The folder `recipes`: package data in an installed wheel, the top of the repository in a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def load_pools(folder: Path | None = None) -> tuple[DomainPool, ...]:
    """The domain pools of `folder` (default: the shipped ones), sorted by name.

    Raises RecipeError with every problem of every file.
    """
    return _read_once(folder or recipes_folder() / "domains")


def load_outside(folder: Path | None = None) -> tuple[DomainPool, ...]:
    """The pools of text outside all domains, sorted by name. Raises RecipeError like `load_pools`."""
    return _read_once(folder or recipes_folder() / "domains" / "outside")


def _read_once(folder: Path) -> tuple[DomainPool, ...]:
    """The pools of a folder, read again where a file of it has changed, or where its name leads elsewhere now."""
    files = sorted(folder.resolve().glob("*.yaml"))
    return _load_folder(folder, tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@functools.cache
def _load_folder(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> tuple[DomainPool, ...]:
    files = [file for file, _, _ in stamps]
    if not files:
        raise RecipeError(str(folder), ["it holds no *.yaml file"])
    pools, problems = [], []
    for file in files:
        try:
            pools.append(load_pool(file))
        except RecipeError as error:
            problems += [f"{file.name}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(str(folder), problems)
    return tuple(sorted(pools, key=lambda pool: pool.name))


def load_pool(path: Path) -> DomainPool:
    """One pool file. Raises RecipeError with all its problems."""
    return pool_of(path, read_yaml(path))


def pool_of(path: Path, document: Document) -> DomainPool:
    """The pool of a file that was read already. Raises RecipeError with all its problems."""
    problems = validation_problems(PoolFile, document)
    raw = document.value
    if isinstance(raw.get("name"), str) and raw["name"] != path.stem:
        problems.append(f"{document.where(('name',))}: must equal the file's name, {path.stem!r}")
    for key in ("descriptions", "prompts"):
        problems += _repeated(document, key)
    if problems:
        raise RecipeError(str(path), problems)
    checked = PoolFile.model_validate(raw)
    return DomainPool(checked.name, checked.description, checked.descriptions, checked.prompts)


def _repeated(document: Document, key: str) -> list[str]:
    items = document.value.get(key)
    first: dict[str, int] = {}
    problems = []
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, str) and first.setdefault(item, index) != index:
            problems.append(f"{document.where((key, index))}: repeats item {first[item]}")
    return problems


def pools_fingerprint(pools: Sequence[DomainPool]) -> str:
    """sha256 over the pools' whole content, in order."""
    content = [[p.name, p.description, list(p.descriptions), list(p.prompts)] for p in pools]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
