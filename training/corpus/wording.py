"""Turns a case into a prompt: the sentence frames of each form, and which wordings are kept for evaluation."""

from __future__ import annotations

import zlib
from random import Random

from training.corpus.shape import Case

FORMS: tuple[str, ...] = ("word", "number", "yes-no", "option")
OPEN = (
    "{what} is {np}?",
    "Give {np}.",
    "Name {np}.",
    "State {np}.",
    "Tell me {np}.",
    "Find {np}.",
    "Can you tell me {np}?",
    "I want to know {np}.",
)
YES_NO = (
    "Is {np} {v}?",
    "Is it true that {np} is {v}?",
    "Would you say that {np} is {v}?",
    "Is it correct that {np} is {v}?",
    "Somebody says that {np} is {v}. Is that right?",
)
OPTION = (
    "{what} is {np}? A) {a}, B) {b} or C) {c}?",
    "Which of these is {np}: A) {a}, B) {b} or C) {c}?",
    "Choose {np}: A) {a}, B) {b} or C) {c}.",
    "Pick the letter of {np}: A) {a}, B) {b} or C) {c}.",
    "Find {np} in this list: A) {a}, B) {b} or C) {c}.",
)
FRAMES: dict[str, tuple[str, ...]] = {"word": OPEN, "number": OPEN, "yes-no": YES_NO, "option": OPTION}
LETTERS = ("A", "B", "C")
PEOPLE = (
    "archivist",
    "athlete",
    "client",
    "creator",
    "designer",
    "engineer",
    "founder",
    "inventor",
    "leader",
    "mathematician",
    "philosopher",
    "pioneer",
    "programmer",
    "pupil",
    "reader",
    "student",
    "thinker",
    "traveller",
)
"""Noun phrases that begin with one of these are asked for with "Who", all others with "What"."""
HELD_OUT_WORDING_EVERY = 4


def interrogative(noun: str) -> str:
    """The question word for a noun phrase such as `the famous mathematician behind calculus`."""
    head = noun.removeprefix("the ").removeprefix("famous ").split()[0]
    return "Who" if head in PEOPLE else "What"


def wordings(domain: str, task: str, form: str, nouns: int, held_out: bool) -> list[tuple[str, int]]:
    """The (frame, index of the noun phrase) pairs of one split.

    Every frame and every noun phrase occurs in training; what is held out is their combination.
    """
    shift = zlib.crc32(f"{domain}/{task}/{form}".encode())
    return [
        (frame, noun)
        for index, frame in enumerate(FRAMES[form])
        for noun in range(nouns)
        if ((index + 2 * noun + shift) % HELD_OUT_WORDING_EVERY == 0) == held_out
    ]


def ask(case: Case, *, domain: str, task: str, form: str, held_out: bool, rng: Random) -> tuple[str, str]:
    """The question (without the scene) and its answer, in the given form and with a wording of the given split."""
    frame, noun = rng.choice(wordings(domain, task, form, len(case.nouns), held_out))
    fields = {"np": case.nouns[noun], "what": interrogative(case.nouns[noun])}
    if form == "yes-no":
        holds = rng.random() < 0.5
        return frame.format(**fields, v=case.answer if holds else case.wrong[0]), "Yes" if holds else "No"
    if form == "option":
        values = [case.answer, *case.wrong[:2]]
        rng.shuffle(values)
        question = frame.format(**fields, a=values[0], b=values[1], c=values[2])
        return question, LETTERS[values.index(case.answer)]
    return frame.format(**fields), case.answer
