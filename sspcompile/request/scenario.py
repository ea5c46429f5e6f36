"""What the user asks for: a recipe, a sentence or a file of prompts, read into one frozen value."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from sspcompile.errors import ScenarioError
from sspcompile.request.documents import plain_text, shown
from sspcompile.request.hub import HUB, read_hub
from sspcompile.request.prompts import Line, Prompt, prompt_of, read_line, say_remarks
from sspcompile.request.recipe import Recipe, ScenarioSpec, find_recipe, load_recipe, shipped_recipes

LINE_BYTES = 1_000_000
FILE_BYTES = 64 * 1024 * 1024
SLUG_CHARACTERS = 48
RECIPE_SUFFIXES = (".yaml", ".yml")
PROMPT_SUFFIXES = (".txt", ".jsonl")
ACCEPTED = (
    "A scenario is a recipe (.yaml), the name of a shipped recipe, a file of prompts (.txt with one per line, .jsonl "
    'with {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} per line), a data set of the hub '
    "(hub:OWNER/NAME), or a sentence of two words or more."
)


@dataclass(frozen=True)
class Scenario:
    """A deployment. One of `text` and `prompts` says what it is, or `domains` (weights that sum to 1), which may stand
    beside them: then nothing has to find out what it is about.

    `name` is a slug, fit for a folder. `origin` says where its prompts came from, where they were read from a file or
    a data set.
    """

    name: str
    text: str | None
    prompts: tuple[Prompt, ...]
    domains: Mapping[str, float] | None
    source: Literal["recipe", "sentence", "prompts"]
    origin: str | None = None

    @property
    def texts(self) -> tuple[Prompt, ...]:
        """What the model reads to recognise the scenario: its prompts, or its sentence."""
        return self.prompts or ((self.text,) if self.text is not None else ())


def read_scenario(value: str) -> tuple[Scenario, Recipe | None]:
    """Read what `--scenario` was given. The recipe, where there is one, has the prompts of its file written out.

    Raises ScenarioError (or RecipeError, for a recipe) in one line with what is accepted.
    """
    _refuse_controls(value, "The scenario")
    if value.startswith(HUB):
        found = read_hub(value)
        return Scenario(slug(value.removeprefix(HUB)), None, found.prompts, None, "prompts", found.origin), None
    path = Path(value)
    suffix = path.suffix.lower()
    if suffix in RECIPE_SUFFIXES + PROMPT_SUFFIXES:
        if not _exists(path):
            raise ScenarioError(f"There is no file {shown(value)}.", hint=ACCEPTED)
        return _read_recipe(path) if suffix in RECIPE_SUFFIXES else (read_prompts(path), None)
    shipped = find_recipe(value)
    if shipped:
        return _read_recipe(shipped)
    if _exists(path):
        kind = "a folder" if path.is_dir() else f"a {suffix or 'nameless'} file"
        raise ScenarioError(f"{shown(value)} is {kind}.", hint=ACCEPTED)
    words = value.split()
    if len(words) == 1 and ("/" in value or "\\" in value):
        raise ScenarioError(f"There is no file {shown(value)}.", hint=ACCEPTED)
    if len(words) < 2:
        raise ScenarioError(_no_such_recipe(value), hint=ACCEPTED)
    text = " ".join(words)
    return Scenario(slug(text), text, (), None, "sentence"), None


def of_prompts(prompts: Iterable[str | Mapping[str, object]], name: str = "prompts") -> Scenario:
    """A scenario of these prompts: texts, or mappings like the lines of a .jsonl file.

    Raises ScenarioError for an empty or unreadable one.
    """
    several = (prompts,) if isinstance(prompts, Mapping) else prompts
    found = [_given(prompt, f"Prompt {number}") for number, prompt in enumerate(several, 1)]
    if not found:
        raise ScenarioError("There are no prompts.", hint=ACCEPTED)
    say_remarks("The prompts given", [line for line, _ in found])
    return Scenario(slug(name), None, tuple(prompt for _, prompt in found), None, "prompts", "a list")


def _given(prompt: object, where: str) -> tuple[Line, Prompt]:
    if isinstance(prompt, str):
        text = prompt.replace("\r\n", "\n").strip()
        _refuse_controls(text, where)
        return Line(text), text
    if not isinstance(prompt, Mapping):
        raise ScenarioError(f"{where} is neither text nor a mapping, but {shown(prompt)}.", hint=ACCEPTED)
    return _read(prompt, where)


def _read(item: object, where: str) -> tuple[Line, Prompt]:
    """What one line of a .jsonl file holds, and the prompt that it is to a build."""
    try:
        line = read_line(item)
        return line, prompt_of(line)
    except ValueError as error:
        raise ScenarioError(f"{where} {error}.", hint=ACCEPTED) from None


def slug(text: str) -> str:
    """A folder name: lower-case ASCII words joined by hyphens, 64 characters at most.

    What is lost on the way (the tail of a long text, letters outside ASCII) is replaced by a short digest, so that
    different scenarios keep different names.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_text.lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:SLUG_CHARACTERS]
        if len(longer) > SLUG_CHARACTERS:
            break
        name = longer
    letters_lost = any(unicodedata.category(c)[0] == "L" and ord(c) >= 0x250 for c in text)
    if name and name == "-".join(words) and not letters_lost:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name or 'scenario'}-{digest}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a sentence longer than a file name may be
        return False


def _no_such_recipe(value: str) -> str:
    if not value.strip():
        return "The scenario is empty."
    names = [path.stem for path in shipped_recipes()]
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    return f"{shown(value)} is one word, and no shipped recipe has that name.{suggestion}"


def _read_recipe(path: Path) -> tuple[Scenario, Recipe]:
    recipe = load_recipe(path)
    spec = recipe.scenario
    if spec.prompts_file:
        prompts = read_prompts(path.parent / spec.prompts_file).prompts
        spec = ScenarioSpec(prompts=prompts, domains=spec.domains)
        recipe = recipe.model_copy(update={"scenario": spec})
    return scenario_of(recipe), recipe


def scenario_of(recipe: Recipe) -> Scenario:
    """The scenario of a recipe whose prompts are written out. Raises ScenarioError when they stand in a file."""
    spec = recipe.scenario
    if spec.prompts_file:
        raise ScenarioError(f"The recipe {recipe.name!r} names a file of prompts.", hint="Read it with its path.")
    domains = None
    if spec.domains:
        total = sum(spec.domains.values())
        domains = MappingProxyType({name: weight / total for name, weight in sorted(spec.domains.items())})
    return Scenario(recipe.name, spec.text, spec.prompts or (), domains, "recipe")


def read_prompts(path: Path) -> Scenario:
    """The scenario of a file of prompts. Raises ScenarioError."""
    if path.suffix.lower() not in PROMPT_SUFFIXES:
        raise ScenarioError(f"{path} is not a {' or '.join(PROMPT_SUFFIXES)} file.", hint=ACCEPTED)
    lines = _lines(path)
    read = _jsonl_prompts if path.suffix.lower() == ".jsonl" else _txt_prompts
    prompts = tuple(read(path, lines))
    if not prompts:
        raise ScenarioError(f"{path} holds no prompts.", hint=ACCEPTED)
    return Scenario(slug(path.stem), None, prompts, None, "prompts", path.name)


def _lines(path: Path) -> list[str]:
    try:
        if not path.is_file():
            raise ScenarioError(f"There is no file {str(path)!r}.", hint=ACCEPTED)
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise ScenarioError(f"{path} cannot be read ({error.strerror}).", hint=ACCEPTED) from None
    if len(data) > FILE_BYTES:
        raise ScenarioError(f"{path} is larger than {FILE_BYTES >> 20} MB.", hint="A few hundred prompts do.")
    if b"\0" in data:
        raise ScenarioError(f"{path} is binary or not UTF-8.", hint=ACCEPTED)
    for number, content in enumerate(data.split(b"\n"), 1):
        if len(content) > LINE_BYTES:
            raise ScenarioError(f"{path}, line {number} is longer than {LINE_BYTES} bytes.", hint=ACCEPTED)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ScenarioError(f"{path}, line {line} is not UTF-8.", hint="Save the file as UTF-8.") from None
    # Not splitlines(): it also splits at U+2028 and others, which may stand inside a prompt.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _txt_prompts(path: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            _refuse_controls(line, f"{path}, line {number}")
            yield line.strip()


def _jsonl_prompts(path: Path, lines: list[str]) -> Iterator[Prompt]:
    read = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too large or too deep"
            raise ScenarioError(f"{where} is not JSON ({reason}).", hint=ACCEPTED) from None
        line_read, prompt = _read(item, where)
        read.append(line_read)
        yield prompt
    say_remarks(path.name, read)


def _refuse_controls(text: str, where: str) -> None:
    if not text.strip():
        raise ScenarioError(f"{where} is empty.", hint=ACCEPTED)
    if len(text.encode("utf-8", "surrogatepass")) > LINE_BYTES:
        raise ScenarioError(f"{where} is longer than {LINE_BYTES} bytes.", hint=ACCEPTED)
    try:
        plain_text(text)
    except ValueError as error:
        raise ScenarioError(f"{where} {error}.", hint=ACCEPTED) from None
