"""Keyword recall and exact match of an answer that was written, against the answers that count as right.

Recall is |prediction & reference| / |reference| over sets of tokens without stop words, the protocol of XDomainBench
with two corrections: every alternative answer is tried and the best counts, and nothing is decoded with a repetition
penalty. Numbers are equal within 0.01; multiple choice compares the chosen letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, get_args

TaskType = Literal["multiple_choice", "factual", "code", "reasoning"]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)

# Decimal: in binary floating point 3.15 - 3.14 is more than 0.01.
TOLERANCE = Decimal("0.01")

# Articles, pronouns, auxiliaries, prepositions and conjunctions. Negations stay: they turn an answer round.
_FUNCTION_WORDS = """
a an the this that these those it its he she they them his her their we us our you your i me my who whom whose which
what is are was were be been being am do does did has have had will would shall should can could might must of in on at
to for from by with as into onto over under about between through during and or but so if then than because while when
where how there here also such
"""
STOPWORDS = frozenset(_FUNCTION_WORDS.split())

_NUMBER = r"(?<![\w.])[-\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d|,\d{3})"
_TOKEN = re.compile(rf"({_NUMBER})|\w+")
_NAMED_LETTER = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*\(?([A-Ja-j])\)?(?!\w)", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"\s*\(?([A-Ja-j])(?:[).:,]|\s*$)")
_BRACKETED_LETTER = re.compile(r"\(([A-Ja-j])\)")

Token = str | Decimal


def tokens(text: str) -> frozenset[Token]:
    """The words in lower case and the numbers of a text; without stop words unless there is nothing else."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    found = {_number(m[1]) if m[1] else m[0] for m in _TOKEN.finditer(normal)}
    kept = found - STOPWORDS
    return frozenset(kept or found)


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-"))


def letter(text: str) -> str | None:
    """The option that an answer names, in upper case, or None.

    A letter counts when it is called the answer, when it opens the text and punctuation or nothing follows (`B`,
    `(b) iron`, `B. iron`; not the article in `A metal`), or when it stands in brackets.
    """
    found = _NAMED_LETTER.search(text) or _LEADING_LETTER.match(text) or _BRACKETED_LETTER.search(text)
    return found[1].upper() if found else None


def keyword_recall(prediction: str, answers: Sequence[str], task_type: str | None = None) -> float:
    """In [0, 1], of the alternative that fits best. A choice whose reference names no letter counts by its words.

    Raises ValueError when there are no answers.
    """
    return max(_recall(prediction, answer, task_type) for answer in answers)


def _recall(prediction: str, answer: str, task_type: str | None) -> float:
    if task_type == "multiple_choice" and (wanted := letter(answer)) is not None:
        return float(letter(prediction) == wanted)
    reference, given = tokens(answer), tokens(prediction)
    if not reference:  # nothing but punctuation
        return float(prediction.strip() == answer.strip())
    numbers = [token for token in given if isinstance(token, Decimal)]
    hits = sum(
        token in given or (isinstance(token, Decimal) and any(abs(token - other) <= TOLERANCE for other in numbers))
        for token in reference
    )
    return hits / len(reference)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the text is one of the answers, white space around it aside."""
    return prediction.strip() in {answer.strip() for answer in answers}
