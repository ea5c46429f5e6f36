"""What a model is asked: a text or a conversation, with the wanted answer behind it where one is known; or what it only
reads, a passage; and the lines of .jsonl files that hold them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

from sspcompile.request.answers import (
    ANSWERS,
    BESIDE_TEXT,
    SURE,
    answer_text,
    held,
    is_empty,
    remarks,
    tidied,
    unread_keys,
)
from sspcompile.request.documents import plain_text, shown

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
# Other names of the roles: OpenAI's newer one, and those of ShareGPT.
OTHER_ROLES: Mapping[str, Role] = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"}
# Of a passage no more is kept: its first few hundred tokens are read, and a recipe holds it.
PASSAGE_CHARACTERS = 8192

log = logging.getLogger("sspcompile")


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `content` has no white space around it."""

    role: Role
    content: str


@dataclass(frozen=True)
class Passage:
    """A text that the model reads as it stands, without a chat template. Nobody asks it anything: what is wanted of the
    model is the text itself, token by token. PASSAGE_CHARACTERS at most.
    """

    text: str


# What a user types, or the conversation that leads to it: messages in any order of roles, the last one the user's. A
# message of the assistant behind it is the reference answer.
Prompt = str | Passage | tuple[Message, ...]


@dataclass(frozen=True)
class Line:
    """What one line of a .jsonl file asks. `answer` is what the file holds, unchecked, None where it holds nothing.

    `needs_answer`: lines of this form are questions, so an evaluation takes a missing answer for a mistake. Of a line
    without an answer: whether a key for one is there and `empty`, and which `unread` keys could hold one.
    """

    prompt: Prompt
    answer: object = None
    needs_answer: bool = False
    empty: bool = False
    unread: tuple[str, ...] = ()


def as_prompt(value: object) -> Prompt:
    """A text, messages (`Message`, or mappings as in the files) or a passage (or the mapping `text` of a recipe) as a
    prompt; a lone text of the user is that text.

    Raises ValueError for anything else, and for a conversation that does not end with the user's words.
    """
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, Passage) or (isinstance(value, Mapping) and set(value) == {"text"}):
        text = value.text if isinstance(value, Passage) else value["text"]
        if not isinstance(text, str):
            raise ValueError(f"must have text under the key 'text', not {shown(text)}")
        return passage(plain_text(text))
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be text, a list of messages, or a mapping with the key text, not {shown(value)}")
    asked, answer = _split_answer([_message(item, f"message {number}") for number, item in enumerate(value, 1)])
    return answered(asked, answer)


PromptField = Annotated[str | Passage | tuple[Message, ...], BeforeValidator(as_prompt)]


def passage(text: str) -> Passage:
    """The passage that begins with `text`."""
    return Passage(text[:PASSAGE_CHARACTERS])


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a prompt; a text is a message of the user, and a passage what the user would paste."""
    return prompt if isinstance(prompt, tuple) else (Message("user", told(prompt)),)


def answered(prompt: Prompt, answer: object) -> Prompt:
    """The prompt with its reference answer, the first where several are right; a number is the text of it, and without
    either the prompt stays alone.

    Raises ValueError for control characters in it, and for an infinite number.
    """
    given = answer_text(answer)
    if given is None:
        return prompt
    return (*messages_of(prompt), Message("assistant", _cleaned(given, "the answer").strip()))


def counted(prompts: Sequence[Prompt]) -> str:
    """How many there are, in words: `24 prompts, 12 with answers`."""
    passages = sum(isinstance(prompt, Passage) for prompt in prompts)
    asked, answers = len(prompts) - passages, sum(answer_of(prompt) is not None for prompt in prompts)
    said = [f"{asked} {'prompt' if asked == 1 else 'prompts'}, {answers or 'none'} with answers"] if asked else []
    said += [f"{passages} {'passage' if passages == 1 else 'passages'}"] if passages else []
    return " and ".join(said)


def asked_of(prompt: Prompt) -> Prompt:
    """The prompt without its reference answer."""
    if not isinstance(prompt, tuple) or prompt[-1].role != "assistant":
        return prompt
    asked = prompt[:-1]
    return asked[0].content if len(asked) == 1 and asked[0].role == "user" else asked


def answer_of(prompt: Prompt) -> str | None:
    """The reference answer of a prompt, None where there is none."""
    return prompt[-1].content if isinstance(prompt, tuple) and prompt[-1].role == "assistant" else None


def is_open(prompt: Prompt) -> bool:
    """Whether nothing says what the model should write: the prompt has no answer, and is no passage."""
    return answer_of(prompt) is None and not isinstance(prompt, Passage)


def pasted(prompt: Prompt) -> Prompt:
    """A passage as a user would paste it, other prompts as they are: to recognise domains was learned from prompts that
    went through the chat template."""
    return prompt.text if isinstance(prompt, Passage) else prompt


def bare(prompt: Prompt) -> Prompt:
    """The prompt as it is compared with others: without its answer, and without white space around it."""
    asked = asked_of(prompt)
    return asked if isinstance(asked, tuple) else told(asked).strip()


def told(prompt: Prompt) -> str:
    """What is asked, as a report shows it: a text as it is, a conversation with the role before each message."""
    prompt = asked_of(prompt)
    if isinstance(prompt, Passage):
        return prompt.text
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)


def read_line(item: object) -> Line:
    """One parsed line. The first key of FORMS that it has says what form it is of; other keys are the file's own.

    Raises ValueError that says what is wrong with it.
    """
    if not isinstance(item, Mapping):
        raise ValueError("must be a JSON object")
    # What else a line holds may be large.
    try:
        item = {key: tidied(value) if key in READ else value for key, value in item.items()}
        for key, read in FORMS.items():
            if item.get(key) is not None:
                return _noted(read(item, key), item, key)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    raise ValueError(f"has none of the keys {', '.join(FORMS)}")


def _noted(line: Line, item: Mapping[str, object], asked: str) -> Line:
    if line.answer is not None and answer_text(line.answer) is not None:
        return line
    empty = any(key in item and is_empty(item[key]) for key in ANSWERS)
    return replace(line, empty=empty, unread=unread_keys(item, asked=asked, question=asked != "text"))


def say_remarks(where: str, lines: Sequence[Line]) -> None:
    """Note what the lines of a file, or prompts like them, have in the place of answers that can be read."""
    for said in remarks(len(lines), sum(line.empty for line in lines), [line.unread for line in lines]):
        log.info("%s: %s", where, said)


def prompt_of(line: Line) -> Prompt:
    """The prompt of a line with its answer; a passage keeps the white space around it. Raises ValueError."""
    return line.prompt if isinstance(line.prompt, Passage) else answered(bare(line.prompt), line.answer)


def _text(item: Mapping[str, object], key: str) -> str:
    value = item[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has no text under the key {key!r}")
    return _cleaned(value, key)


def _cleaned(value: str, place: str) -> str:
    """With plain line ends. Raises ValueError for control characters."""
    value = value.replace("\r\n", "\n")
    try:
        return plain_text(value) if value.strip() else value
    except ValueError as error:
        raise ValueError(f"{place} {error}") from None


def _message(item: object, place: str) -> Message:
    if isinstance(item, Message):
        item = {"role": item.role, "content": item.content}
    if not isinstance(item, Mapping):
        raise ValueError(f"{place} must be a mapping with role and content, not {shown(item)}")
    role, content = (item.get(name, item.get(other)) for name, other in (("role", "from"), ("content", "value")))
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{place} has the role {shown(role)}; accepted: {', '.join((*ROLES, *OTHER_ROLES))}")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} must have text as its content, not {shown(content)}")
    return Message(role, _cleaned(content, place).strip())


def _is_text_part(part: object) -> bool:
    """Whether it is a part of a content as vision models take it, `{"type": "text", "text": ...}`."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _split_answer(found: Sequence[Message]) -> tuple[Prompt, str | None]:
    """What stands up to the last message of the user, and the assistant's answer to it where there is one."""
    last = max((place for place, message in enumerate(found) if message.role == "user"), default=None)
    if last is None:
        raise ValueError("holds no message of the user")
    behind = found[last + 1 :]
    if any(message.role != "assistant" for message in behind):
        raise ValueError("has a system message behind the last message of the user")
    if not found[last].content:
        raise ValueError("has an empty message of the user at its end")
    asked = tuple(found[: last + 1])
    return asked[0].content if len(asked) == 1 else asked, behind[0].content if behind else None


def _conversation(item: Mapping[str, object], key: str) -> Line:
    listed = item[key]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"has no list of messages under the key {key!r}")
    found = [_message(message, f"message {number} of {key!r}") for number, message in enumerate(listed, 1)]
    try:
        asked, last = _split_answer(_with_system(item, found))
    except ValueError as error:
        raise ValueError(f"{error} (key {key!r})") from None
    # What the assistant says in the conversation itself, before keys that may be about something else.
    given = _answer(item, SURE)
    given = last or _answer(item, ANSWERS) if given is None else given
    return Line(asked, given)


def _prompt(item: Mapping[str, object], key: str) -> Line:
    if isinstance(item[key], list):
        return _conversation(item, key)
    return Line(_text(item, key), _answer(item, ANSWERS), needs_answer=True)


def _instruction(item: Mapping[str, object], key: str) -> Line:
    """Alpaca: the input stands on a line of its own below the instruction; `history` holds earlier pairs of texts."""
    asked = _text(item, key)
    if isinstance(item.get("input"), str) and str(item["input"]).strip():
        asked = f"{asked.rstrip()}\n{_text(item, 'input').lstrip()}"
    history = item.get("history") or []
    if not isinstance(history, list):
        raise ValueError("has no list of pairs under the key 'history'")
    found = []
    for number, pair in enumerate(history, 1):
        place = f"pair {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{place} must be a list of two texts")
        found += [
            Message(*turn) for turn in zip(ROLES[1:], (_cleaned(text, place).strip() for text in pair), strict=True)
        ]
    prompt, _ = _split_answer(_with_system(item, [*found, Message("user", asked)]))
    return Line(prompt, _answer(item, ("output", *ANSWERS)), needs_answer=True)


def _plain(item: Mapping[str, object], key: str) -> Line:
    """A text with an answer is a question; alone it is read as it stands."""
    text, answer = _text(item, key), _answer(item, BESIDE_TEXT)
    return Line(passage(text) if answer is None else text, answer)


def _with_system(item: Mapping[str, object], found: list[Message]) -> list[Message]:
    """A system message that stands beside the conversation goes before it, unless the conversation has its own."""
    beside = item.get("system")
    if not isinstance(beside, str) or not beside.strip() or (found and found[0].role == "system"):
        return found
    return [Message("system", _cleaned(beside, "'system'").strip()), *found]


def _answer(item: Mapping[str, object], keys: Sequence[str]) -> object:
    """What stands under the first of the keys that holds something; the words of the assistant where that is a list of
    messages, with or without those that it answers. A list of mappings that are none (quotations, parts) is no answer.
    """
    answer = held(item, keys)
    if not isinstance(answer, list) or not any(isinstance(part, Mapping) for part in answer):
        return answer
    if not all(isinstance(part, Mapping) and _has_role(part) for part in answer):
        return None
    found = [_message(part, f"message {number} of the answer") for number, part in enumerate(answer, 1)]
    last = max((place for place, message in enumerate(found) if message.role == "user"), default=-1)
    return next((message.content for message in found[last + 1 :] if message.role == "assistant"), None)


def _has_role(message: Mapping[str, object]) -> bool:
    """Whether it is a message that `_message` takes."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    known = isinstance(role, str) and OTHER_ROLES.get(role, role) in ROLES
    return known and (isinstance(content, str) or (isinstance(content, list) and all(map(_is_text_part, content))))


FORMS: Mapping[str, Callable[[Mapping[str, object], str], Line]] = {
    "prompt": _prompt,
    "messages": _conversation,
    "conversations": _conversation,
    "instruction": _instruction,
    "question": _prompt,
    "text": _plain,
    "query": _prompt,
    "problem": _prompt,
    "input": _prompt,
}
READ = frozenset((*FORMS, *ANSWERS, "input", "system", "history"))
