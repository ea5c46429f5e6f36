"""The text of the embedded model: short questions with checkable answers in six domains and two outside ones.

Every domain has the same tasks in the same forms and the same proportions; only content tells domains apart. Each mixes
*recalled facts*, *rules* over small numbers and *reading*, where the answer stands in the prompt and must be found in
one step or several, or combined with what is known. What there is to read differs: each domain has a procedure of its
own (`stories`), which is what a scenario's own mask can specialise in.

The `heldout` split shares facts with `train` (they must be learned somewhere) but no wording of them, no operands of
rules and no text to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counter
from random import Random
from typing import Literal

from training.corpus import chemistry, finance, geography, history, math, philosophy, sports, technology
from training.corpus.shape import Domain
from training.corpus.tasks import TASKS, Task, draw_reading
from training.corpus.wording import FORMS, ask

Split = Literal["train", "heldout"]

_INSIDE = (chemistry, finance, history, math, philosophy, technology)
_OUTSIDE = (geography, sports)
DOMAIN_DATA: dict[str, Domain] = {module.DOMAIN.name: module.DOMAIN for module in _INSIDE + _OUTSIDE}
DOMAINS: tuple[str, ...] = tuple(module.DOMAIN.name for module in _INSIDE)
OUTSIDE_DOMAINS: tuple[str, ...] = tuple(module.DOMAIN.name for module in _OUTSIDE)

FORM_CYCLE: tuple[str, ...] = ("word", "number", "word", "word", "number")
"""The forms of five consecutive items: 3 words and 2 numbers, in every domain alike.

The wording knows yes/no questions and lettered options too; a model of this size does not learn them in an hour.
"""
MAX_REDRAWS = 200

__all__ = [
    "DOMAINS",
    "DOMAIN_DATA",
    "FORMS",
    "FORM_CYCLE",
    "OUTSIDE_DOMAINS",
    "TASKS",
    "Item",
    "Split",
    "cross_items",
    "items",
    "tasks_by_form",
]


@dataclass(frozen=True)
class Item:
    """One question as a user would type it, with the only answer that counts as correct."""

    domain: str
    task: str
    form: str
    prompt: str
    answer: str


def tasks_by_form(form: str, reading: bool | None = None) -> tuple[Task, ...]:
    """The tasks that can be asked in this form, all or only those that do (or do not) read a text."""
    return tuple(task for task in TASKS if form in task.forms and reading in (None, task.reads))


def _draw(domain: Domain, task: Task, form: str, held_out: bool, rng: Random) -> Item:
    reading = draw_reading((domain,), rng, held_out) if task.reads else None
    case = task.draw(domain, rng, held_out, reading)
    question, answer = ask(case, domain=domain.name, task=task.name, form=form, held_out=held_out, rng=rng)
    return Item(domain.name, task.name, form, f"{reading.text} {question}" if reading else question, answer)


def _schedule(reading: bool | None = None) -> Iterator[tuple[str, Task]]:
    """Forms in the fixed cycle, and within a form its tasks in turn: the same sequence for every domain."""
    turns = dict.fromkeys(FORMS, 0)
    for index in counter():
        form = FORM_CYCLE[index % len(FORM_CYCLE)]
        tasks = tasks_by_form(form, reading)
        yield form, tasks[turns[form] % len(tasks)]
        turns[form] += 1


def items(domain: str, split: Split, seed: int, count: int) -> list[Item]:
    """`count` items of one domain with different prompts, the same for the same arguments.

    The sequence of (form, task) does not depend on domain, split or seed. Raises ValueError for an unknown domain or
    split, or if the split has too few different prompts.
    """
    if domain not in DOMAIN_DATA:
        raise ValueError(f"unknown domain {domain!r}; known: {', '.join(DOMAIN_DATA)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout")
    rng = Random(f"{domain}/{split}/{seed}")
    drawn: dict[str, Item] = {}
    for (form, task), _ in zip(_schedule(), range(count), strict=False):
        for _attempt in range(MAX_REDRAWS):
            item = _draw(DOMAIN_DATA[domain], task, form, split == "heldout", rng)
            if item.prompt not in drawn:
                drawn[item.prompt] = item
                break
        else:
            raise ValueError(f"{domain}/{split} has no further prompts for {task.name} as {form}; ask for fewer items")
    return list(drawn.values())


def cross_items(split: Split, seed: int, count: int) -> list[Item]:
    """Items whose text is of two of the six domains; the domain reads like `chemistry+finance`."""
    rng = Random(f"cross/{split}/{seed}")
    drawn: dict[str, Item] = {}
    schedule = _schedule(reading=True)
    while len(drawn) < count:
        form, task = next(schedule)
        pair = [DOMAIN_DATA[name] for name in sorted(rng.sample(DOMAINS, 2))]
        reading = draw_reading(pair, rng, split == "heldout")
        case = task.draw(pair[0], rng, split == "heldout", reading)
        name = "+".join(domain.name for domain in pair)
        question, answer = ask(case, domain=name, task=task.name, form=form, held_out=split == "heldout", rng=rng)
        item = Item(name, task.name, form, f"{reading.text} {question}", answer)
        drawn.setdefault(item.prompt, item)
    return list(drawn.values())
