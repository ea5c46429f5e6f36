"""The strict YAML reader, and the words for what is wrong: pools and recipes are read by the same rules."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sspcompile.errors import RecipeError

YAML_BYTES = 256 * 1024
YAML_DEPTH = 12
SHOWN_CHARACTERS = 60
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"

PLAIN_TYPES: Mapping[str, str] = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}

Place = tuple[str | int, ...]


def plain_text(value: str) -> str:
    """`value`, unless it is blank or holds what a terminal or a file would choke on. Raises ValueError."""
    if not value.strip():
        raise ValueError("must not be blank")
    for character in value:
        if character in "\n\t":
            continue
        code = ord(character)
        if code < 0x20 or 0x7F <= code < 0xA0:
            raise ValueError(f"must not hold the control character U+{code:04X}")
        if 0xD800 <= code <= 0xDFFF:
            raise ValueError(f"must not hold the lone surrogate U+{code:04X}")
    return value


Text = Annotated[str, AfterValidator(plain_text)]


@dataclass(frozen=True)
class Document:
    """A YAML mapping and, for every place in it, the line (from 1) where it stands."""

    value: Mapping[str, Any]
    lines: Mapping[Place, int]

    def where(self, place: Place) -> str:
        """`scenario.prompts[2] (line 9)`; a place that is not in the file takes the line of its parent."""
        line = next((self.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.lines), None)
        return dotted(place) + (f" (line {line})" if line else "")


def dotted(place: Place) -> str:
    """`("prompts", 2)` as `prompts[2]`."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return parts.removeprefix(".") or "top level"


def read_yaml(path: Path, *, limit: int = YAML_BYTES) -> Document:
    """Read one YAML mapping of at most `limit` bytes.

    Refuses, with RecipeError: files that are missing, too large, not UTF-8, empty or no mapping; repeated keys;
    aliases and merge keys (they can make a small file huge in memory); nesting deeper than any recipe has.
    """
    text = _utf8(path, limit)
    try:
        _refuse_expansion(path, text)
        node = YAML(typ="safe", pure=True).compose(text)
        if not isinstance(node, MappingNode):
            raise RecipeError(str(path), ["the file must be a mapping of keys to values, and not be empty"])
        lines: dict[Place, int] = {}
        problems = list(_walk(node, (), lines))
        if problems:
            raise RecipeError(str(path), problems)
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(str(path), [f"{line}not valid YAML ({_flat(error.problem or error.context)})"]) from None
    except (YAMLError, ValueError) as error:  # ValueError: a date that does not exist, a number of 5,000 digits
        raise RecipeError(str(path), [f"not valid YAML ({_flat(error)})"]) from None
    return Document(value=value, lines=lines)


def _utf8(path: Path, limit: int) -> str:
    try:
        if not path.is_file():
            raise RecipeError(str(path), ["there is no such file"])
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise RecipeError(str(path), [f"it cannot be read ({error.strerror})"]) from None
    if len(data) > limit:
        raise RecipeError(str(path), [f"it is larger than {limit // 1024} KB"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise RecipeError(str(path), [f"it is not UTF-8 text ({what})"]) from None


def _refuse_expansion(path: Path, text: str) -> None:
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent):
            raise RecipeError(str(path), [f"line {event.start_mark.line + 1}: aliases (*name) are not accepted"])
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > YAML_DEPTH:
            line = event.start_mark.line + 1
            raise RecipeError(str(path), [f"line {line}: nested deeper than {YAML_DEPTH} levels"])


def _walk(node: Node, place: Place, lines: dict[Place, int]) -> Iterator[str]:
    """Fill `lines`, and yield a problem for every key that is repeated or is not a plain word."""
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*place, index), lines)
    if not isinstance(node, MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            yield f"{dotted(place)} (line {line}): keys must be plain words"
            continue
        if key.value in seen:
            yield f"{dotted((*place, key.value))} (line {line}): repeats the key of line {seen[key.value]}"
        seen.setdefault(key.value, line)
        lines.setdefault((*place, key.value), line)
        yield from _walk(value, (*place, key.value), lines)


def _flat(message: object) -> str:
    return " ".join(str(message).split())[:200]


# ---- pydantic's errors in plain words -----------------------------------------------------------------------


def validation_problems(model: type[BaseModel], document: Document) -> list[str]:
    """Every error that `model` finds in the document, each with its place and line; empty when it is valid."""
    try:
        model.model_validate(document.value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        broken = {e["loc"][:-1] for e in errors}  # a list of wrong items is not also too short
        return [
            f"{document.where(e['loc'])}: {explain(e, model)}"
            for e in errors
            if not (e["type"] == "too_short" and e["loc"] in broken)
        ]
    return []


def explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error in plain words; an unknown key comes with the closest known one."""
    kind, place = error["type"], error["loc"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        known = list(_fields_at(model, place[:-1]))
        close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        return "is not a known key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
    if kind in ("value_error", "exclusive"):
        return error["msg"].removeprefix("Value error, ")
    if kind == "too_short":
        return f"needs at least {error['ctx']['min_length']} item"
    if kind == "string_pattern_mismatch":
        return f"must be lower-case letters, digits and hyphens, not {shown(error['input'])}"
    message = PLAIN_TYPES.get(kind) or error["msg"].replace("Input should be", "must be")
    return f"{message}, not {shown(error['input'])}"


def _fields_at(model: type[BaseModel], place: Place) -> Iterator[str]:
    for part in place:
        annotation = model.model_fields[str(part)].annotation
        candidates = (annotation, *getattr(annotation, "__args__", ()))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    yield from model.model_fields


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy as Python's own, inside of lists and mappings too; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    # No import of NumPy: most commands do without.
    return plain(value.tolist()) if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def shown(value: object) -> str:
    """A value as it may stand in a one-line message: escaped and short."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
