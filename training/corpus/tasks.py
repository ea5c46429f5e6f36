"""The tasks that every domain has: what is asked, its answer and plausible wrong answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from training.corpus.shape import OWNERS, Case, Domain, Fields, Rule, Table
from training.corpus.stories import READING_TASKS, Story, tell_story

HELD_OUT_EVERY = 5
"""One story in five, and one set of operands per rule in five, is never seen in training."""


@dataclass(frozen=True)
class Reading:
    """What there is to read: the story of a domain, or those of two in one text."""

    stories: tuple[tuple[Domain, Story], ...]

    @property
    def text(self) -> str:
        """All sentences, joined by spaces."""
        return " ".join(story.text for _, story in self.stories)


@dataclass(frozen=True)
class Task:
    """A task: what it needs to be drawn (`reads` says whether a text) and in which forms it can be asked."""

    name: str
    reads: bool
    forms: tuple[str, ...]
    draw: Callable[[Domain, Random, bool, Reading | None], Case]


def is_held_out(*parts: object) -> bool:
    """Whether these operands or this text belong to the held-out split; the same answer in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode()) % HELD_OUT_EVERY == 0


def draw_reading(domains: Sequence[Domain], rng: Random, held_out: bool) -> Reading:
    """The stories of the domains in one text of the wanted split.

    No person occurs in two of them, and names and amounts differ within each, so every question has one answer.
    """
    while True:
        owners = rng.sample(OWNERS, len(OWNERS))
        stories = []
        for index, domain in enumerate(domains):
            # The second story takes its people from the other end; no pair of kinds needs more than there are.
            stories.append((domain, tell_story(domain, owners[::-1] if index else owners, rng)))
        rng.shuffle(stories)
        reading = Reading(tuple(stories))
        if is_held_out(reading.text) == held_out:
            return reading


def _fill(nouns: tuple[str, ...], fields: Fields) -> tuple[str, ...]:
    return tuple(noun.format(**fields) for noun in nouns)


def _others(answer: str, *pools: Iterable[str], rng: Random, count: int = 2) -> tuple[str, ...]:
    """`count` values other than the answer, from the first pools before the later ones."""
    found: list[str] = []
    for pool in pools:
        rest = sorted({value for value in pool if value != answer and value not in found})
        rng.shuffle(rest)
        found.extend(rest)
    return tuple(found[:count])


def _nearby(answer: str, rng: Random) -> tuple[str, ...]:
    value = int(answer)
    return tuple(map(str, rng.sample([n for n in range(max(1, value - 9), value + 10) if n != value], 2)))


def _recall(table: Callable[[Domain], Table]) -> Callable[[Domain, Random, bool, Reading | None], Case]:
    def draw(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
        facts = table(domain).facts
        key = rng.choice(sorted(facts))
        wrong = _others(facts[key], facts.values(), rng=rng)
        return Case(_fill(table(domain).nouns, {"k": key}), facts[key], wrong)

    return draw


def _rule(rule: Callable[[Domain], Rule], name: str) -> Callable[[Domain, Random, bool, Reading | None], Case]:
    def draw(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
        while True:
            fields, answer = rule(domain).draw(rng)
            if is_held_out(domain.name, name, sorted(fields.items())) == held_out:
                break
        outcomes = rule(domain).outcomes
        wrong = _others(answer, outcomes, rng=rng) if outcomes else _nearby(answer, rng)
        return Case(_fill(rule(domain).nouns, fields), answer, wrong)

    return draw


def _read(name: str) -> Callable[[Domain, Random, bool, Reading | None], Case]:
    def draw(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
        if reading is None:
            raise ValueError("a reading task needs a text")
        _, story = rng.choice(reading.stories)
        return rng.choice(story.cases[name])

    return draw


WORDS, NUMBERS = ("word", "yes-no", "option"), ("number", "yes-no", "option")

TASKS: tuple[Task, ...] = (
    Task("recall-first", False, WORDS, _recall(lambda domain: domain.first)),
    Task("recall-second", False, WORDS, _recall(lambda domain: domain.second)),
    Task("recall-figure", False, NUMBERS, _recall(lambda domain: domain.figures)),
    Task("rule-one", False, NUMBERS, _rule(lambda domain: domain.rules[0], "rule-one")),
    Task("rule-two", False, NUMBERS, _rule(lambda domain: domain.rules[1], "rule-two")),
    Task("verdict", False, ("word", "yes-no"), _rule(lambda domain: domain.verdict, "verdict")),
    *(Task(name, True, NUMBERS if name == "read-number" else WORDS, _read(name)) for name in READING_TASKS),
)
