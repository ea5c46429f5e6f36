"""Training documents: several questions on one text, or several without one, as token ids with a loss weight each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from transformers import PreTrainedTokenizerFast

from training.corpus import DOMAIN_DATA, DOMAINS, FORM_CYCLE, tasks_by_form
from training.corpus.tasks import draw_reading
from training.corpus.wording import ask
from training.subjects import draw_description
from training.tokenizer import QUESTION

QUESTIONS_PER_SCENE = (2, 4)
QUESTIONS_WITHOUT_SCENE = 5
CROSS_SHARE = 0.1
DESCRIPTION_WEIGHT = 0.05
"""Weight of the words of a text whose topic is asked; the topic itself counts in full."""


@dataclass(frozen=True)
class Diet:
    """What a stage of training is fed: domains, tasks (all if empty), and shares.

    `shortened` is the share of look-ups asked by nothing but the name, like `Mira?`.
    """

    domains: tuple[str, ...] = DOMAINS
    tasks: tuple[str, ...] = ()
    forms: tuple[str, ...] = FORM_CYCLE
    shortened: float = 0.0
    scenes: float = 0.45
    descriptions: float = 0.06


@dataclass(frozen=True)
class Document:
    """Token ids, and for each id the weight of its loss as a target (0 in questions)."""

    ids: list[int]
    weights: list[float]


Turn = tuple[str, str]


def _choose(diet: Diet, reading: bool, rng: Random) -> tuple[str, object]:
    while True:
        form = rng.choice(diet.forms)
        tasks = [task for task in tasks_by_form(form, reading) if not diet.tasks or task.name in diet.tasks]
        if tasks:
            return form, rng.choice(tasks)


def scene_turns(diet: Diet, rng: Random) -> list[Turn]:
    """Questions on one text to read, which stands in the first of them."""
    cross = len(diet.domains) > 1 and rng.random() < CROSS_SHARE
    names = sorted(rng.sample(diet.domains, 2 if cross else 1))
    domains = [DOMAIN_DATA[name] for name in names]
    reading = draw_reading(domains, rng, held_out=False)
    turns: list[Turn] = []
    for _ in range(rng.randint(*QUESTIONS_PER_SCENE)):
        form, task = _choose(diet, True, rng)
        case = task.draw(domains[0], rng, False, reading)
        question, answer = ask(case, domain="+".join(names), task=task.name, form=form, held_out=False, rng=rng)
        if case.key and form == "word" and rng.random() < diet.shortened:
            question = f"{case.key}?"
        turns.append((question if turns else f"{reading.text} {question}", answer))
    return turns


def closed_turns(diet: Diet, rng: Random) -> list[Turn]:
    """Questions that need no text, of any domains."""
    turns = []
    for _ in range(QUESTIONS_WITHOUT_SCENE):
        form, task = _choose(diet, False, rng)
        domain = DOMAIN_DATA[rng.choice(diet.domains)]
        case = task.draw(domain, rng, False, None)
        turns.append(ask(case, domain=domain.name, task=task.name, form=form, held_out=False, rng=rng))
    return turns


class DocumentStream:
    """An endless, seeded stream of documents; `diet` may be replaced while it runs."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, described: Sequence[tuple[str, str]], seed: int, diet: Diet
    ) -> None:
        """`described` are (description, domain) pairs for a small share of plain language modelling."""
        self.diet = diet
        self._backend = tokenizer.backend_tokenizer
        self._eos = tokenizer.eos_token_id
        self._described = described
        self._rng = Random(f"documents/{seed}")
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        # The pre-tokenizer never joins across a space followed by a word, so pieces can be cached one by one.
        ids: list[int] = []
        for index, piece in enumerate(text.split(" ")):
            piece = piece if index == 0 else " " + piece
            if piece not in self._cache:
                self._cache[piece] = self._backend.encode(piece).ids
            ids.extend(self._cache[piece])
        return ids

    def _document(self, turns: list[Turn]) -> Document:
        ids: list[int] = []
        weights: list[float] = []
        for prompt, answer in turns:
            question = self._encode(QUESTION.format(prompt=prompt))
            reply = [*self._encode(" " + answer), self._eos]
            ids.extend((*question, *reply))
            weights.extend([0.0] * len(question) + [1.0] * len(reply))
        return Document(ids, weights)

    def _drawn_text(self, rng: Random) -> tuple[str, str]:
        """A text and its domain: a written description, a composed one, or a question of the corpus."""
        kind = rng.random()
        if kind < 0.25:
            return rng.choice(self._described)
        domain = rng.choice(self.diet.domains)
        if kind < 0.75:
            return draw_description(domain, rng), domain
        turns = (scene_turns if rng.random() < 0.5 else closed_turns)(
            replace(self.diet, domains=(domain,), shortened=0.0), rng
        )
        return turns[0][0], domain

    def _topic(self, text: str, domain: str) -> Document:
        text_ids = self._encode(f"Question: {text}\nTopic:")
        topic_ids = [*self._encode(f" {domain}"), self._eos]
        return Document(text_ids + topic_ids, [DESCRIPTION_WEIGHT] * len(text_ids) + [1.0] * len(topic_ids))

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield self.draw()

    def draw(self) -> Document:
        """The next document."""
        rng, diet = self._rng, self.diet
        if self._described and rng.random() < diet.descriptions:
            return self._topic(*self._drawn_text(rng))
        return self._document((scene_turns if rng.random() < diet.scenes else closed_turns)(diet, rng))
