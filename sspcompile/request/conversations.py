"""Which prompts belong to one conversation: its turns, and the several answers of one question.

A log often has a line for every request, and each of them repeats the conversation so far. What one line asks stands
inside the next, so lines of one conversation may not be spread over texts that choose and texts that judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from sspcompile.request.prompts import Message, Prompt, bare

# A prompt that others go on from in so many ways is a greeting, or an example before every question: what begins with
# it are many conversations.
FEWEST_WAYS = 8


class Opening(NamedTuple):
    """A conversation, by the shortest of its prompts, as `bare` gives it. `alone`: it is that prompt and no other, how
    ever others begin.
    """

    of: Prompt
    alone: bool = False


def openings(prompts: Iterable[Prompt]) -> dict[Prompt, Opening]:
    """The conversation of every prompt, by the prompt as `bare` gives it, in the order of the prompts.

    A prompt goes on from another where its messages begin with all of the other's, whose answer they repeat.
    """
    texts = tuple(dict.fromkeys(map(bare, prompts)))
    places: dict[tuple[int, Message], int] = {}  # a tree of messages: what comes behind a place, and where that is
    paths = [_path(text, places) for text in texts]
    ends = {path[-1]: text for path, text in zip(paths, texts, strict=True)}
    begun = [[place for place in path if place in ends] for path in paths]
    ways = Counter(behind[-2] for behind in begun if len(behind) > 1)
    found = {}
    for text, behind in zip(texts, begun, strict=True):
        first = next((place for place in behind if ways[place] < FEWEST_WAYS), None)
        found[text] = Opening(text, alone=True) if first is None else Opening(ends[first])
    return found


def is_of(prompt: Prompt, conversations: Collection[Opening]) -> bool:
    """Whether a prompt belongs to one of them, which came from `openings` of other prompts."""
    text = bare(prompt)
    if Opening(text, alone=True) in conversations or Opening(text) in conversations:
        return True
    return isinstance(text, tuple) and any(Opening(part) in conversations for part in _beginnings(text))


def asked_in(prompts: Iterable[Prompt]) -> set[Prompt]:
    """Everything that a user says in them, as `bare` gives a text."""
    texts = map(bare, prompts)
    said = ((m.content for m in text if m.role == "user") if isinstance(text, tuple) else (text,) for text in texts)
    return {one for part in said for one in part}


def _path(text: Prompt, places: dict[tuple[int, Message], int]) -> list[int]:
    """Where each message of a bare prompt stands in the tree; a text is a message of the user."""
    said = text if isinstance(text, tuple) else (Message("user", str(text)),)
    path, place = [], 0
    for message in said:
        place = places.setdefault((place, message), len(places) + 1)
        path.append(place)
    return path


def _beginnings(text: Sequence[Message]) -> Iterator[Prompt]:
    """What a conversation was when its user had spoken once, twice, ..."""
    for count, message in enumerate(text, 1):
        if message.role == "user":
            yield message.content if count == 1 else tuple(text[:count])
