"""How the options of a build are typed, read off their types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sspcompile.request.amounts import Amount, Pairs
from sspcompile.request.options import Options


@dataclass(frozen=True)
class Kind:
    """How an option is typed: `number` (int, float or None for text), its `choices`, whether it may be repeated,
    whether it is a switch, an `amount` (a whole number, or text with a unit), or `pairs` of a name and a share.
    """

    number: type[int] | type[float] | None
    choices: tuple[str, ...]
    multiple: bool
    switch: bool
    amount: bool
    pairs: bool


def kind_of(name: str) -> Kind:
    """How the option `name` is typed."""
    kinds = list(_kinds(Options.model_fields[name].annotation))
    choices = tuple(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))
    number = next((kind for kind in (int, float) if kind in kinds), None)
    marks = [item for kind in kinds for item in getattr(kind, "__metadata__", ())]
    amount, pairs = (any(isinstance(item, mark) for item in marks) for mark in (Amount, Pairs))
    several = pairs or any(get_origin(kind) is tuple for kind in kinds)
    return Kind(number, choices, several, bool in kinds, amount, pairs)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, and what a tuple holds beside it."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
        return
    yield annotation
    if origin is tuple:
        yield from _kinds(get_args(annotation)[0])
