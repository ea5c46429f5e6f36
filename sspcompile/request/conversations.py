"""Which prompts belong to one conversation: its turns, and the several answers of one question.

A log often has a line for every request, and each of them repeats the conversation so far. What one line asks stands
inside the next, so lines of one conversation may not be spread over texts that choose and texts that judge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from sspcompile.request.prompts import Message, Prompt, bare

# Of an opening that more than this share of the prompts have, nothing says that they are one conversation.
MOST_OF_ONE = 1 / 4
# It is a greeting, or an example that stands before every question, where prompts go on from it in so many ways.
FEWEST_WAYS = 8
# The depth of a prompt that is taken whole.
WHOLE = -1


class Opening(NamedTuple):
    """What tells a conversation from others: its first message of the user (`depth` 0), all messages up to its first,
    second, ... message of the user (1, 2, ...), or a prompt as a whole (WHOLE).
    """

    depth: int
    of: Prompt


def openings(prompts: Iterable[Prompt]) -> dict[Prompt, Opening]:
    """The conversation of every prompt, by the prompt as `bare` gives it, in the order of the prompts.

    That is the first message of the user, whatever system message stands before it; of a text, the text. Where more
    than MOST_OF_ONE of the prompts open alike and go on in FEWEST_WAYS or more, they are told apart by as many of their
    next messages as that takes: conversations that all begin with "Hi" are many.
    """
    texts = tuple(dict.fromkeys(map(bare, prompts)))
    found = dict(_told_apart(texts, 0, MOST_OF_ONE * len(texts)))
    return {text: found[text] for text in texts}


def is_of(prompt: Prompt, conversations: Collection[Opening]) -> bool:
    """Whether a prompt belongs to one of them, which came from `openings` of other prompts."""
    text = bare(prompt)
    begins = (Opening(depth, _opening(text, depth)) for depth in range(_turns(text) + 1))
    return Opening(WHOLE, text) in conversations or any(one in conversations for one in begins)


def asked_in(prompts: Iterable[Prompt]) -> set[Prompt]:
    """Everything that a user says in them, as `bare` gives a text."""
    texts = map(bare, prompts)
    said = ((m.content for m in text if m.role == "user") if isinstance(text, tuple) else (text,) for text in texts)
    return {one for part in said for one in part}


def _told_apart(texts: Sequence[Prompt], depth: int, most: float) -> Iterator[tuple[Prompt, Opening]]:
    groups = defaultdict[Opening, list[Prompt]](list)
    for text in texts:
        short = _turns(text) < depth
        groups[Opening(WHOLE, text) if short else Opening(depth, _opening(text, depth))].append(text)
    for opening, group in groups.items():
        deeper = _parting(group, depth) if len(group) > most else None
        if deeper is None:
            yield from ((text, opening) for text in group)
        else:
            yield from _told_apart(group, deeper, most)


def _parting(group: Sequence[Prompt], depth: int) -> int | None:
    """The depth at which prompts that open alike go on in FEWEST_WAYS; None where they never do."""
    for deeper in range(depth + 1, max(map(_turns, group)) + 1):
        if len({_opening(text, deeper) for text in group if _turns(text) >= deeper}) >= FEWEST_WAYS:
            return deeper
    return None


def _turns(text: Prompt) -> int:
    """How many messages of the user it has."""
    return sum(message.role == "user" for message in text) if isinstance(text, tuple) else 1


def _opening(text: Prompt, depth: int) -> Prompt:
    """What a bare prompt opens with, at a depth of no more than its turns."""
    if not isinstance(text, tuple):
        return text
    places = [place for place, message in enumerate(text) if message.role == "user"]
    if depth == 0:
        return text[places[0]].content
    opening: tuple[Message, ...] = text[: places[depth - 1] + 1]
    return opening[0].content if len(opening) == 1 else opening
