"""What a domain consists of: tables to recall, rules to apply, scenes to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

Fields = dict[str, str | int]

OWNERS = ("Mira", "Olek", "Tessa", "Ruben", "Ines", "Pavel", "Nora", "Viktor")
"""The people in the scenes; the same in all domains, so that a name does not give the domain away."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A closed table of facts: `nouns` are noun phrases with a `{k}` for the key, all asking for the value."""

    nouns: tuple[str, ...]
    facts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A small procedure: `draw` fills the fields of the noun phrases and returns the answer beside them."""

    nouns: tuple[str, ...]
    draw: Callable[[Random], tuple[Fields, str]]
    outcomes: tuple[str, ...] = ()
    """All possible answers of a rule whose answers are words; empty where answers are numbers."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """How a domain's texts to read are worded; `kind` names the procedure in `stories` that tells and asks them.

    The rows and the noun phrases for each reading task have the fields that the kind fills: owners `{n}` and `{m}`,
    items `{i}` and `{j}`, an amount `{a}`, an ordinal `{o}`. Items are keys of the domain's first table, so that a
    question can go from what was read to what is known.
    """

    kind: str
    rows: tuple[str, ...]
    near: tuple[str, ...]
    far: tuple[str, ...]
    deep: tuple[str, ...]
    number: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A question before it has a wording: `nouns` all ask for `answer`, `wrong` are at least two other values.

    `key` is the name asked about, where the name alone would do as the question.
    """

    nouns: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One domain. Every domain fills the same places, so that only content tells them apart."""

    name: str
    first: Table
    second: Table
    figures: Table
    rules: tuple[Rule, Rule]
    verdict: Rule
    scene: Scene


def added(a: tuple[int, int], b: tuple[int, int]) -> Callable[[Random], tuple[Fields, str]]:
    """Two numbers from the inclusive ranges and their sum."""

    def draw(rng: Random) -> tuple[Fields, str]:
        x, y = rng.randint(*a), rng.randint(*b)
        return {"a": x, "b": y}, str(x + y)

    return draw


def subtracted(a: tuple[int, int]) -> Callable[[Random], tuple[Fields, str]]:
    """A number from the inclusive range, a smaller one (at least 1), and their difference."""

    def draw(rng: Random) -> tuple[Fields, str]:
        x = rng.randint(*a)
        y = rng.randint(1, x - 1)
        return {"a": x, "b": y}, str(x - y)

    return draw


def multiplied(a: tuple[int, int], b: tuple[int, int]) -> Callable[[Random], tuple[Fields, str]]:
    """Two numbers from the inclusive ranges and their product."""

    def draw(rng: Random) -> tuple[Fields, str]:
        x, y = rng.randint(*a), rng.randint(*b)
        return {"a": x, "b": y}, str(x * y)

    return draw


def compared(a: tuple[int, int], less: str, more: str) -> Callable[[Random], tuple[Fields, str]]:
    """Two different numbers from the inclusive range; the answer is `less` if the first is smaller, else `more`."""

    def draw(rng: Random) -> tuple[Fields, str]:
        x, y = rng.sample(range(a[0], a[1] + 1), 2)
        return {"a": x, "b": y}, less if x < y else more

    return draw
