"""The questions that ship with the embedded model: nothing in its training or in a domain pool repeats one of them.

`training.questions` writes the file.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

QUESTIONS_FILE: Path = Path(__file__).parent / "questions.jsonl"


@dataclass(frozen=True)
class KnownQuestion:
    """A prompt with the only answer that counts as correct."""

    prompt: str
    answer: str


def questions(domain: str) -> tuple[KnownQuestion, ...]:
    """The questions of a domain, none where it is not one of ours.

    Kinds of task take turns, so any run of neighbours asks them in nearly equal parts.
    """
    return _by_domain().get(domain, ())


@functools.cache
def _by_domain() -> dict[str, tuple[KnownQuestion, ...]]:
    found: dict[str, list[KnownQuestion]] = {}
    for line in QUESTIONS_FILE.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["domain"], []).append(KnownQuestion(row["prompt"], row["answer"]))
    return {domain: tuple(known) for domain, known in found.items()}
