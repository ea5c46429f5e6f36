"""Answers in the lines of files of prompts: the keys that hold them, and what is said of those that cannot be read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sspcompile.request.documents import plain, shown

# Under which keys a line may hold its answer, in this order. The first three are told of nothing else.
SURE = ("answer", "completion", "response")
ANSWERS = (*SURE, "output", "target", "reference", "chosen", "solution", "answers", "label")
# Beside a text other keys hold its class, or where it is from, more often than an answer to it.
BESIDE_TEXT = SURE
# Words of a key that holds an answer, whatever is read.
LIKELY = re.compile(
    "answers?|completion|response|output|target|reference|chosen|solution|labels?|gold|truth|expected|ideal|reply|"
    "summary|highlights"
)
# Keys that tell of a line, or stand in the question. Anything else beside a question could be its answer.
FACTS = re.compile(
    ".*_id|.*_at|id|idx|index|key|uid|uuid|hash|seed|source|origin|domain|task|task_type|category|subcategory|topic|"
    "subject|tags?|type|kind|format|difficulty|level|lang|language|locale|licen[cs]e|url|link|split|date|time|"
    "timestamp|created|title|name|author|user|username|model|dataset|version|score|rating|count|length|tokens|meta|"
    "metadata|comment|notes?|system|history|input|context|tools|functions|images?"
)
SHOWN_KEYS = 4


def tidied(value: object) -> object:
    """A value of a line as JSON has it: a number of NumPy as Python's, and NaN, an empty cell of a table, as None."""
    value = plain(value)
    if isinstance(value, list | tuple):
        return [tidied(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def numeral(value: object) -> object:
    """A number as the text of it, NaN as None, anything else as it is. Raises ValueError for infinity."""
    value = tidied(value)
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("has an infinite number as its answer; give text or a finite number")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def answer_text(answer: object) -> str | None:
    """The text of an answer, the first of several; None where there is none. Raises ValueError like `numeral`."""
    several = answer if isinstance(answer, list) else [answer]
    texts = [numeral(one) for one in several]  # each, whichever is taken: a number that is none spoils the line
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def is_empty(value: object) -> bool:
    """Whether nothing stands there: null, NaN, blank text, or a list of such."""
    if isinstance(value, list):
        return all(map(is_empty, value))
    return tidied(value) is None or (isinstance(value, str) and not value.strip())


def held(item: Mapping[str, object], keys: Sequence[str]) -> object:
    """What stands under the first of these keys that holds something; a label counts where it is text."""
    for key in keys:
        value = item.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # as SQuAD has several
            value = value["text"]
        if not is_empty(value) and (key != "label" or isinstance(value, str)):
            return value
    return None


def looks_like_answer(key: str) -> bool:
    """Whether a key is called like one that holds an answer: by its last word, since `response_time` is none."""
    words = re.findall(r"[a-z]+", key.lower())
    return bool(words) and LIKELY.fullmatch(words[-1]) is not None


def unread_keys(item: Mapping[str, object], *, asked: str, question: bool) -> tuple[str, ...]:
    """Of a line without an answer that is read: the keys that could hold one. `asked` is the key of its prompt.

    Where it is no `question`, other texts are nothing unusual beside it, and only the name of a key tells.
    """
    return tuple(
        key
        for key, value in item.items()
        if key != asked and not is_empty(value) and (key in SURE or _could_answer(key, value, question=question))
    )


def _could_answer(key: str, value: object, *, question: bool) -> bool:
    if isinstance(value, bool) or key.startswith("rejected"):  # of a pair of answers the worse one
        return False
    key = key.lower()
    fact = FACTS.fullmatch(key) or FACTS.fullmatch(key.rsplit("_", 1)[-1])
    return _says(value) and (looks_like_answer(key) or (question and not fact))


def _says(value: object) -> bool:
    """Text, a number, a list of them, or messages among which one is the assistant's."""
    if isinstance(value, list):
        return any(_says(one) or (isinstance(one, Mapping) and _is_assistants(one)) for one in value)
    return isinstance(value, str | int | float)


def _is_assistants(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) in ("assistant", "gpt", "model")


def remarks(total: int, empty: int, unread: Iterable[tuple[str, ...]]) -> list[str]:
    """What users should know of `total` prompts, a sentence each: how many have an `empty` answer, and which keys,
    that are not read, may hold it."""
    said = []
    if empty:
        said.append(f"{_of(empty, total)} an empty answer (null, NaN or blank), which counts as none.")
    several = [keys for keys in unread if keys]
    if several:
        known = [key for key, _ in Counter(key for keys in several for key in keys).most_common()]
        names = ", ".join(shown(key) for key in known[:SHOWN_KEYS]) + (" and others" if known[SHOWN_KEYS:] else "")
        said.append(
            f"{_of(len(several), total)} no answer that is read, but {names}. Read are {', '.join(ANSWERS)} (text, a "
            "number, or a list of them); rename the key if it holds the answer."
        )
    return said


def _of(count: int, total: int) -> str:
    return f"{count} of {total} prompts {'has' if count == 1 else 'have'}"
