"""What an evaluation asks: questions with or without answers, alone or as turns of a conversation, and their files.

Files: `.jsonl` in the forms of `request.prompts` (`prompt` and `answer`, `messages`, ...), and the JSON of
XDomainBench: a pool (a list of texts) or a scenario (`scenario_id`, `domain` or `cross_domains`, `turns` with `prompt`,
`answer`, `task_type`), or a list of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sspcompile.errors import InputError
from sspcompile.evaluate.recall import TASK_TYPES
from sspcompile.request.answers import ANSWERS, numeral
from sspcompile.request.documents import Text, dotted, explain, plain_text, shown
from sspcompile.request.prompts import Passage, Prompt, read_line, told

FILE_BYTES = 64 * 1024 * 1024
ACCEPTED = (
    'Accepted: .jsonl with {"prompt": "...", "answer": "..." or ["...", ...]} or {"messages": [...]} per line, '
    "or XDomainBench .json files or a folder of them."
)
KEYS = f"Keys of an answer: {', '.join(ANSWERS)}."


@dataclass(frozen=True)
class Question:
    """One turn. `answers` holds every text that counts as right, none when nobody knows."""

    prompt: Prompt
    answers: tuple[str, ...] = ()
    task_type: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in their order; a question by itself is a conversation of one turn."""

    turns: tuple[Question, ...]


def single(questions: Sequence[Question]) -> tuple[Conversation, ...]:
    """Each question by itself."""
    return tuple(Conversation((question,)) for question in questions)


def _answers(value: object) -> tuple[str, ...]:
    given = [numeral(one) for one in (value if isinstance(value, list) else [value])]
    texts = [one for one in given if isinstance(one, str)]
    if not texts or len(texts) < len(given):
        raise ValueError("must be text or a list of texts (numbers count as text)")
    return tuple(map(plain_text, texts))


def _task_type(value: object) -> object:
    if value is not None and value not in TASK_TYPES:
        raise ValueError(f"must be one of {', '.join(TASK_TYPES)}")
    return value


Answers = Annotated[tuple[str, ...], BeforeValidator(_answers)]
TaskTypeField = Annotated[str | None, BeforeValidator(_task_type)]


class LineFile(BaseModel):
    """What a line of a .jsonl file holds beside its prompt. Other keys are the file's own business."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    answer: Answers = ()
    task_type: TaskTypeField = None
    domain: Text | None = None


class TurnFile(LineFile):
    """One turn of a scenario."""

    prompt: Text
    answer: Answers

    def question(self, domain: str | None = None) -> Question:
        return Question(self.prompt, self.answer, self.task_type, self.domain or domain)


class ScenarioFile(BaseModel):
    """One scenario of XDomainBench."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    scenario_id: str | int
    domain: Text | None = None
    cross_domains: tuple[Text, ...] | None = Field(default=None, min_length=1, strict=False)
    topic_description: str | None = None
    turns: tuple[TurnFile, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _has_domain(self) -> ScenarioFile:
        if self.domain is None and self.cross_domains is None:
            raise PydanticCustomError("exclusive", "needs domain or cross_domains")
        return self

    def conversation(self) -> Conversation:
        domain = self.domain or "+".join(self.cross_domains or ())
        return Conversation(tuple(turn.question(domain) for turn in self.turns))


def read_data(path: Path) -> tuple[Conversation, ...]:
    """The conversations of a file or of all .json files under a folder.

    Raises InputError that names the file, the place in it, and what is accepted.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise InputError(f"{path} holds no .json files.", hint=ACCEPTED)
        return tuple(conversation for file in files for conversation in read_data(file))
    if not path.is_file():
        raise InputError(f"There is no file {path}.", hint=ACCEPTED)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise InputError(f"{path} is a {suffix or 'nameless'} file.", hint=ACCEPTED)
    text = _utf8(path)
    found = tuple(_jsonl(path, text) if suffix == ".jsonl" else _xdomainbench(path, _parsed(str(path), text)))
    if not found:
        raise InputError(f"{path} holds no prompts.", hint=ACCEPTED)
    return found


def _utf8(path: Path) -> str:
    if path.stat().st_size > FILE_BYTES:
        raise InputError(f"{path} is larger than {FILE_BYTES >> 20} MB.", hint="Split it.")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8.", hint="Save the file as UTF-8.") from None


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too large or too deep"
        raise InputError(f"{where} is not JSON ({reason}).", hint=ACCEPTED) from None


def _jsonl(path: Path, text: str) -> Iterator[Conversation]:
    # Not splitlines(): it also splits at U+2028 and others, which may stand inside a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Conversation((_question(_parsed(where, line), where),))


def _question(item: Any, where: str) -> Question:
    try:
        line = read_line(item)
    except ValueError as error:
        raise InputError(f"{where} {error}.", hint=ACCEPTED) from None
    if line.answer is None and line.needs_answer:
        other = f", and {', '.join(map(shown, line.unread))} is not read" if line.unread else ""
        raise InputError(f"{where}: answer is missing{other}.", hint=f"{KEYS} {ACCEPTED}" if other else ACCEPTED)
    answer = {} if line.answer is None else {"answer": line.answer}
    labels = _checked(LineFile, {**{key: item.get(key) for key in ("task_type", "domain")}, **answer}, where)
    asked = told(line.prompt) if isinstance(line.prompt, Passage) else line.prompt
    return Question(asked, labels.answer, labels.task_type, labels.domain)


def _xdomainbench(path: Path, value: Any) -> Iterator[Conversation]:
    if isinstance(value, dict):
        yield _checked(ScenarioFile, value, str(path)).conversation()
        return
    if not isinstance(value, list):
        raise InputError(f"{path} is neither a list nor a scenario.", hint=ACCEPTED)
    for index, entry in enumerate(value):
        where = f"{path}, entry {index}"
        if isinstance(entry, str):
            try:
                yield Conversation((Question(plain_text(entry)),))
            except ValueError as error:
                raise InputError(f"{where} {error}.", hint=ACCEPTED) from None
        else:
            yield _checked(ScenarioFile, entry, where).conversation()


def _checked(kind: type[Any], value: Any, where: str) -> Any:
    """`value` as a model. Raises InputError with the first thing that is wrong with it."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object or a text.", hint=ACCEPTED)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = f"{dotted(problem['loc'])} " if problem["loc"] else ""
        raise InputError(f"{where}: {place}{explain(problem, kind)}.", hint=ACCEPTED) from None
