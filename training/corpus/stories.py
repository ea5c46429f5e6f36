"""What there is to read: one kind of text per domain, each with a procedure of its own.

All domains ask the same four things of their texts: `read-near` (one step), `read-far` (a harder step, or two),
`read-deep` (up to three steps, and one more into a recalled fact) and `read-number` (one to three). How the answer is
found differs: by name and helper, by time, along a line of successors, by place in a list, through implications,
through copies. So heads can specialise by domain although form and answer style say nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from training.corpus.shape import OWNERS, Case, Domain, Scene

AMOUNTS = (2, 20)
SCENE_ITEMS = 6
"""How many keys of a domain's first table occur in its texts; more names make reading much slower to learn."""
ORDINALS = ("first", "second", "third", "fourth")
READING_TASKS = ("read-near", "read-far", "read-deep", "read-number")


@dataclass(frozen=True)
class Story:
    """Sentences in their order, and for each reading task the questions that they answer."""

    rows: tuple[str, ...]
    cases: Mapping[str, tuple[Case, ...]]

    @property
    def text(self) -> str:
        """The sentences, joined by spaces."""
        return " ".join(self.rows)


def scene_items(domain: Domain) -> list[str]:
    """The names that occur in a domain's texts: keys of its first table that are one word."""
    return [key for key in sorted(domain.first.facts) if " " not in key][:SCENE_ITEMS]


class _Teller:
    """Draws distinct names and amounts, and turns templates into cases."""

    def __init__(self, domain: Domain, owners: Sequence[str], rng: Random) -> None:
        self.domain, self.scene, self.rng = domain, domain.scene, rng
        self._owners = list(owners)
        self._items = rng.sample(scene_items(domain), SCENE_ITEMS)
        self._amounts = rng.sample(range(AMOUNTS[0], AMOUNTS[1] + 1), 6)

    def owners(self, count: int) -> list[str]:
        taken, self._owners = self._owners[:count], self._owners[count:]
        return taken

    def items(self, count: int) -> list[str]:
        taken, self._items = self._items[:count], self._items[count:]
        return taken

    def amounts(self, count: int) -> list[int]:
        taken, self._amounts = self._amounts[:count], self._amounts[count:]
        return taken

    def case(self, nouns: tuple[str, ...], answer: str, *, key: str = "", **fields: str) -> Case:
        """A question for a name (or, with a number as the answer, for an amount)."""
        filled = tuple(noun.format(**fields) for noun in nouns)
        if answer.isdigit():
            pool = [str(n) for n in range(AMOUNTS[0], AMOUNTS[1] + 1)]
        else:
            pool = scene_items(self.domain) if answer in scene_items(self.domain) else list(OWNERS)
        return Case(filled, answer, self._wrong(answer, pool), key)

    def fact(self, inner: tuple[str, ...], item: str, **fields: str) -> Case:
        """A question for what the first table says of an item that the text names."""
        table = self.domain.first
        items = [noun.format(**fields) for noun in inner]
        nouns = tuple(noun.format(k=filled) for filled in items for noun in table.nouns)
        return Case(nouns, table.facts[item], self._wrong(table.facts[item], list(table.facts.values())))

    def _wrong(self, answer: str, pool: list[str]) -> tuple[str, ...]:
        others = sorted(set(pool) - {answer})
        return tuple(self.rng.sample(others, 2))


def table(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """Three lines that join an owner, an item and an amount, and who helps whom; asked by owner, item and helper."""
    tell = _Teller(domain, owners, rng)
    scene, lines = domain.scene, list(zip(tell.owners(3), tell.items(3), tell.amounts(3), strict=True))
    turned = rng.sample(lines, len(lines))
    helped = list(pairwise(turned))
    rows = [scene.rows[0].format(n=n, i=i, a=a) for n, i, a in lines]
    rows += [scene.rows[1].format(n=m[0], m=n[0]) for m, n in helped]
    rng.shuffle(rows)
    return Story(
        tuple(rows),
        {
            "read-near": tuple(tell.case(scene.near, i, key=n, n=n) for n, i, _ in lines),
            "read-far": tuple(tell.case(scene.far, n, key=i, i=i) for n, i, _ in lines),
            "read-deep": tuple(tell.fact(scene.deep, n[1], n=m[0]) for m, n in helped),
            "read-number": tuple(tell.case(scene.number, str(a), n=n) for n, _, a in lines),
        },
    )


def ledger(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """Four entries in time, two for each of two owners; asked for the first and the last of an owner."""
    tell = _Teller(domain, owners, rng)
    scene, (one, other) = domain.scene, tell.owners(2)
    turns = [one, one, other, other]
    rng.shuffle(turns)
    lines = list(zip(turns, tell.items(4), tell.amounts(4), strict=True))
    own = {owner: [line for line in lines if line[0] == owner] for owner in (one, other)}
    return Story(
        tuple(scene.rows[0].format(n=n, i=i, a=a) for n, i, a in lines),
        {
            "read-near": tuple(tell.case(scene.near, own[n][0][1], n=n) for n in own),
            "read-far": tuple(tell.case(scene.far, own[n][1][1], n=n) for n in own),
            "read-deep": tuple(tell.fact(scene.deep, own[n][1][1], n=n) for n in own),
            "read-number": tuple(tell.case(scene.number, str(own[n][1][2]), n=n) for n in own),
        },
    )


def succession(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """Five names in a line of successors, told out of order; asked one, two and three places along the line."""
    tell = _Teller(domain, owners, rng)
    scene, line, amounts = domain.scene, tell.items(5), tell.amounts(4)
    steps = [(before, after, a) for (before, after), a in zip(pairwise(line), amounts, strict=True)]
    told = rng.sample(steps, len(steps))
    return Story(
        tuple(scene.rows[0].format(i=before, j=after, a=a) for before, after, a in told),
        {
            "read-near": tuple(tell.case(scene.near, after, key=before, i=before) for before, after, _ in steps),
            "read-far": tuple(tell.case(scene.far, line[k + 2], i=line[k]) for k in range(3)),
            "read-deep": tuple(tell.fact(scene.deep, line[k + 3], i=line[k]) for k in range(2)),
            "read-number": tuple(tell.case(scene.number, str(steps[k + 1][2]), i=line[k]) for k in range(3)),
        },
    )


def listing(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """A list of four names and one of four numbers; asked by place and by neighbour."""
    tell = _Teller(domain, owners, rng)
    scene, names, amounts = domain.scene, tell.items(4), tell.amounts(4)
    pairs = list(pairwise(names))
    return Story(
        (scene.rows[0].format(list=", ".join(names)), scene.rows[1].format(list=", ".join(map(str, amounts)))),
        {
            "read-near": tuple(tell.case(scene.near, after, key=before, i=before) for before, after in pairs),
            "read-far": tuple(tell.case(scene.far, name, o=o) for o, name in zip(ORDINALS, names, strict=True)),
            "read-deep": tuple(tell.fact(scene.deep, after, i=before) for before, after in pairs),
            "read-number": tuple(tell.case(scene.number, str(a), o=o) for o, a in zip(ORDINALS, amounts, strict=True)),
        },
    )


def implication(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """Two owners with an item each, what each item leads to, and that in turn; asked for what follows for an owner."""
    tell = _Teller(domain, owners, rng)
    scene, amounts = domain.scene, tell.amounts(4)
    lines = list(zip(tell.owners(2), tell.items(2), tell.items(2), tell.items(2), strict=True))
    rows = [scene.rows[0].format(n=n, i=i) for n, i, _, _ in lines]
    links = [link for _, i, j, k in lines for link in ((i, j), (j, k))]
    pages = dict(zip(links, amounts, strict=True))
    rows += [scene.rows[1].format(i=i, j=j, a=a) for (i, j), a in pages.items()]
    rng.shuffle(rows)
    return Story(
        tuple(rows),
        {
            "read-near": tuple(tell.case(scene.near, i, key=n, n=n) for n, i, _, _ in lines),
            "read-far": tuple(tell.case(scene.far, j, n=n) for n, _, j, _ in lines),
            "read-deep": tuple(tell.fact(scene.deep, k, n=n) for n, _, _, k in lines),
            "read-number": tuple(tell.case(scene.number, str(pages[i, j]), n=n) for n, i, j, _ in lines),
        },
    )


def copies(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """Two owners with an item and an amount, one that copies the first, one that copies the copy, one the second."""
    tell = _Teller(domain, owners, rng)
    scene, (a, b, of_a, of_copy, of_b) = domain.scene, tell.owners(5)
    (item_a, item_b), (amount_a, amount_b) = tell.items(2), tell.amounts(2)
    rows = [scene.rows[0].format(n=n, i=i, a=x) for n, i, x in ((a, item_a, amount_a), (b, item_b, amount_b))]
    rows += [scene.rows[1].format(n=n, m=m) for n, m in ((of_a, a), (of_copy, of_a), (of_b, b))]
    rng.shuffle(rows)
    return Story(
        tuple(rows),
        {
            "read-near": (tell.case(scene.near, item_a, key=a, n=a), tell.case(scene.near, item_b, key=b, n=b)),
            "read-far": (tell.case(scene.far, item_a, n=of_a), tell.case(scene.far, item_b, n=of_b)),
            "read-deep": (tell.fact(scene.deep, item_a, n=of_copy), tell.fact(scene.deep, item_b, n=of_b)),
            "read-number": (
                tell.case(scene.number, str(amount_a), n=of_copy),
                tell.case(scene.number, str(amount_b), n=of_b),
            ),
        },
    )


KINDS: Mapping[str, Callable[[Domain, Sequence[str], Random], Story]] = {
    kind.__name__: kind for kind in (table, ledger, succession, listing, implication, copies)
}


def tell_story(domain: Domain, owners: Sequence[str], rng: Random) -> Story:
    """A text of the domain's kind about people from `owners`, in that order."""
    scene: Scene = domain.scene
    return KINDS[scene.kind](domain, owners, rng)
