"""The tasks that every domain has: what is asked, its answer and plausible wrong answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from sspcompile.embedded.corpus.shape import OWNERS, Domain, Fields, Rule, Table

HELD_OUT_EVERY = 5
"""One scene in five, and one set of operands per rule in five, is never seen in training."""
ROWS = (2, 3)
AMOUNTS = (2, 20)
SCENE_ITEMS = 6
"""How many keys of a domain's first table occur in its scenes; more names make reading much slower to learn."""


@dataclass(frozen=True)
class Row:
    """One line of a scene."""

    owner: str
    item: str
    amount: int
    sentence: str
    domain: Domain


@dataclass(frozen=True)
class Reading:
    """A drawn scene: its rows in the order in which they stand in the text."""

    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """The sentences, joined by spaces."""
        return " ".join(row.sentence for row in self.rows)


@dataclass(frozen=True)
class Case:
    """A question before it has a wording: `nouns` all ask for `answer`, `wrong` are at least two other values.

    `key` is the name asked about, where there is one.
    """

    nouns: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]
    key: str = ""


@dataclass(frozen=True)
class Task:
    """A task: what it needs to be drawn (`reads` says whether a scene) and in which forms it can be asked."""

    name: str
    reads: bool
    forms: tuple[str, ...]
    draw: Callable[[Domain, Random, bool, Reading | None], Case]


def is_held_out(*parts: object) -> bool:
    """Whether these operands or this scene belong to the held-out split; the same answer in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode()) % HELD_OUT_EVERY == 0


def draw_reading(domains: Iterable[Domain], rng: Random, held_out: bool, size: int | None = None) -> Reading:
    """A scene of the wanted split with `size` rows (2 or 3 if not given), taken in turn from the domains.

    Owners, items and amounts differ between the rows, so every question has one answer.
    """
    domains = tuple(domains)
    while True:
        count = size or rng.randint(*ROWS)
        owners = rng.sample(OWNERS, count)
        items = {domain.name: rng.sample(sorted(domain.first.facts)[:SCENE_ITEMS], count) for domain in domains}
        amounts = rng.sample(range(AMOUNTS[0], AMOUNTS[1] + 1), count)
        layout = rng.random()
        rows = []
        for index, amount in enumerate(amounts):
            domain = domains[index % len(domains)]
            owner, item = owners[index], items[domain.name][index]
            template = domain.scene.rows[int(layout * len(domain.scene.rows))]
            rows.append(Row(owner, item, amount, template.format(n=owner, i=item, a=amount), domain))
        rng.shuffle(rows)
        reading = Reading(tuple(rows))
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


def _scene(reading: Reading | None) -> tuple[Row, ...]:
    if reading is None:
        raise ValueError("a reading task needs a scene")
    return reading.rows


def _same_domain(rows: tuple[Row, ...], row: Row) -> list[Row]:
    return [other for other in rows if other.domain is row.domain]


def _item(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _scene(reading)
    row = rng.choice(rows)
    peers = [other.item for other in _same_domain(rows, row)]
    wrong = _others(row.item, peers, sorted(row.domain.first.facts)[:SCENE_ITEMS], rng=rng)
    return Case(_fill(row.domain.scene.item, {"n": row.owner}), row.item, wrong, row.owner)


def _amount(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _scene(reading)
    row = rng.choice(rows)
    numbers = map(str, range(AMOUNTS[0], AMOUNTS[1] + 1))
    wrong = _others(str(row.amount), (str(other.amount) for other in rows), numbers, rng=rng)
    return Case(_fill(row.domain.scene.amount, {"n": row.owner}), str(row.amount), wrong)


def _owner(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _scene(reading)
    row = rng.choice(rows)
    peers = [other.owner for other in _same_domain(rows, row)]
    wrong = _others(row.owner, peers, OWNERS, rng=rng)
    return Case(_fill(row.domain.scene.owner, {"i": row.item}), row.owner, wrong, row.item)


def _extreme(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _same_domain(_scene(reading), rng.choice(_scene(reading)))
    scene = rows[0].domain.scene
    most = rng.random() < 0.5
    row = (max if most else min)(rows, key=lambda other: other.amount)
    wrong = _others(row.owner, [other.owner for other in rows], OWNERS, rng=rng)
    return Case(scene.most if most else scene.fewest, row.owner, wrong)


def _hop(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _scene(reading)
    row = rng.choice(rows)
    table, scene = row.domain.first, row.domain.scene
    peers = [table.facts[other.item] for other in _same_domain(rows, row)]
    answer = table.facts[row.item]
    items = _fill(scene.item, {"n": row.owner})
    nouns = tuple(noun.format(k=item) for item in items for noun in table.nouns)
    return Case(nouns, answer, _others(answer, peers, table.facts.values(), rng=rng))


def _total(domain: Domain, rng: Random, held_out: bool, reading: Reading | None) -> Case:
    rows = _same_domain(_scene(reading), rng.choice(_scene(reading)))
    if len(rows) < 2:
        return _amount(domain, rng, held_out, reading)
    first, second = rng.sample(rows, 2)
    answer = str(first.amount + second.amount)
    return Case(_fill(first.domain.scene.total, {"n": first.owner, "m": second.owner}), answer, _nearby(answer, rng))


WORDS, NUMBERS = ("word", "yes-no", "option"), ("number", "yes-no", "option")

TASKS: tuple[Task, ...] = (
    Task("recall-first", False, WORDS, _recall(lambda domain: domain.first)),
    Task("recall-second", False, WORDS, _recall(lambda domain: domain.second)),
    Task("recall-figure", False, NUMBERS, _recall(lambda domain: domain.figures)),
    Task("rule-one", False, NUMBERS, _rule(lambda domain: domain.rules[0], "rule-one")),
    Task("rule-two", False, NUMBERS, _rule(lambda domain: domain.rules[1], "rule-two")),
    Task("verdict", False, ("word", "yes-no"), _rule(lambda domain: domain.verdict, "verdict")),
    Task("read-item", True, WORDS, _item),
    Task("read-amount", True, NUMBERS, _amount),
    Task("read-owner", True, WORDS, _owner),
    Task("read-and-recall", True, WORDS, _hop),
)

FURTHER_TASKS: tuple[Task, ...] = (
    Task("compare", True, WORDS, _extreme),
    Task("total", True, ("number",), _total),
)
"""For a harder model: the embedded one is neither trained on them nor asked them."""
