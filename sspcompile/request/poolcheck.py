"""What is wrong with domain pools beyond their form: what would teach a probe something else than the domain.

A probe learns to tell domains apart by whatever tells the pools apart. Prompts that repeat each other make few texts
look like many; a first word, an ending or a layout that only one pool has is learned in the place of its subject; the
sentences of the embedded model are of a small language that no deployment speaks. The bounds were set on the pools that
ship, which keep them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspcompile.embedded import POOLS_DIR
from sspcompile.errors import InputError, RecipeError
from sspcompile.request.documents import Document, read_yaml, shown
from sspcompile.request.domains import DomainPool, load_outside, load_pools, pool_of, recipes_folder
from sspcompile.request.recipe import load_recipe

# Every fourth prompt is held out and half of those judge: of 50, six.
FEWEST_PROMPTS, FEWEST_DESCRIPTIONS = 50, 10
# Words at the ninetieth percentile of the prompts over those at the tenth; where it is smaller, length tells the pool.
LEAST_SPREAD = 3.0
SHINGLE_WORDS = 3
# Of one pool, the share of the shorter prompt's shingles that stand in the other one too.
NEAR_INSIDE = 0.5
# Of two pools, shared shingles over all of both (Jaccard): "Who was the first woman" opens questions of many subjects.
NEAR_ACROSS = 0.4
# The same for single sentences beside those of the embedded model. Numbers count as equal there: its texts are forms
# that are filled in.
NEAR_EMBEDDED, SENTENCE_WORDS = 0.6, 4
# A form gives a pool away when this share of its prompts has it and no more than that of all others ...
GIVEAWAY, ELSEWHERE = 0.25, 0.05
# ... or when the two shares are so far apart.
GIVEAWAY_GAP = 0.5
# Who acts in the embedded model's texts. One of these names may be anybody's; two of them in one prompt are not.
EMBEDDED_NAMES = frozenset({"mira", "olek", "tessa", "ruben", "ines", "pavel", "nora", "viktor"})
LAYOUTS: Mapping[str, re.Pattern[str]] = {
    "several lines": re.compile(r"\n"),
    "an empty line": re.compile(r"\n[ \t]*\n"),
    "indented lines": re.compile(r"\n[ \t]+\S"),
    "lines of a list": re.compile(r"(?m)^[ \t]*(?:[-*•]|\d+[.)]) "),
    "options A, B, C": re.compile(r"(?s)\bA[.)] .*\bB[.)] .*\bC[.)] "),
    "rows of a table": re.compile(r"\|.*\|.*\||,.*,.*\n"),
    "no capital letter": re.compile(r"\A[^A-Z]*\Z"),
    "capital letters alone": re.compile(r"\A(?=.*[A-Z])[^a-z]*\Z", re.DOTALL),
}
SENTENCE_END = re.compile(r"[.?!]\s+|\n+")

Shingles = frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class Problem:
    """`file` as it was named; `rule` for programs: `form`, `setting` (of a recipe), `name`, `size`, `length`,
    `near-duplicate`, `giveaway` or `embedded`; `said`: the place in the file, and what is wrong with it."""

    file: str
    rule: str
    said: str


@dataclass(frozen=True)
class Checked:
    """The files that were read, each with the name of its recipe or pool (None where it has none), all problems, and
    which of the files are `recipes`."""

    files: Mapping[str, str | None]
    problems: tuple[Problem, ...]
    recipes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Read:
    """A pool with the places of its file."""

    file: Path
    document: Document
    pool: DomainPool

    def where(self, key: str, number: int) -> str:
        return self.document.where((key, number))


def check(path: Path) -> Checked:
    """Check a recipe, a pool, or a folder of them, with the pools of its folder `outside`.

    Pools are compared with each other and with those that ship, beside which a build would take them. Raises InputError
    where there is nothing to check.
    """
    files = [*sorted(path.glob("*.yaml")), *sorted(path.glob("outside/*.yaml"))] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        missing = f"{path} holds no .yaml file." if path.is_dir() else f"There is no file {path}."
        raise InputError(missing, hint="Name a recipe or a domain pool, a .yaml file, or a folder of them.")
    names: dict[str, str | None] = {}
    problems: list[Problem] = []
    pools: list[_Read] = []
    recipes: list[Path] = []
    for file in files:
        try:
            document = read_yaml(file)
            if "scenario" in document.value or not {"prompts", "descriptions"} & set(document.value):
                recipes.append(file)
                names[str(file)] = load_recipe(file).name
                continue
            pools.append(_Read(file, document, pool_of(file, document)))
            names[str(file)] = pools[-1].pool.name
        except RecipeError as error:
            names[str(file)] = None
            problems += [Problem(str(file), "form", said) for said in error.problems]
    return Checked(names, (*problems, *_beyond_form(pools)), tuple(recipes))


def _beyond_form(read: Sequence[_Read]) -> Iterator[Problem]:
    # The embedded model's own pools are written by a generator, in the language that others are kept free of.
    read = [one for one in read if not one.file.resolve().is_relative_to(POOLS_DIR.resolve())]
    if not read:
        return
    names, shipped = {one.pool.name for one in read}, (*load_pools(), *load_outside())
    others = [pool for pool in shipped if pool.name not in names]
    for one in read:
        ours = one.file.resolve().is_relative_to(recipes_folder().resolve())
        if not ours and one.pool.name in {pool.name for pool in shipped}:
            said = f"{one.document.where(('name',))}: is the name of a shipped pool; rename the file and the pool"
            yield Problem(str(one.file), "name", said)
        yield from _sizes(one)
        yield from _giveaways(one, [*(other.pool for other in read if other is not one), *others])
        yield from _embedded_sentences(one)
    yield from _repeats(read, others)


def _sizes(one: _Read) -> Iterator[Problem]:
    for key, fewest in (("prompts", FEWEST_PROMPTS), ("descriptions", FEWEST_DESCRIPTIONS)):
        if (count := len(getattr(one.pool, key))) < fewest:
            yield Problem(str(one.file), "size", f"{key}: {count} are too few; write {fewest} or more")
    words = [len(prompt.split()) for prompt in one.pool.prompts]
    short, long = np.percentile(words, [10, 90])
    if long < LEAST_SPREAD * short:
        said = f"prompts: too uniform in length, four of five have {short:.0f} to {long:.0f} words"
        yield Problem(str(one.file), "length", f"{said}; add short and long ones")


def forms_of(prompt: str) -> frozenset[str]:
    """What can be said of a prompt without understanding it: its first and last word, its end, marks and layout."""
    text = prompt.strip()
    words = re.findall(r"\w+", text.lower())
    found = {name for name, pattern in LAYOUTS.items() if pattern.search(text)}
    found |= {f"the character {mark}" for mark in set(text) if not mark.isalnum() and not mark.isspace()}
    if not text[-1:].isalnum():
        found.add(f"{text[-1:]} at the end")
    if words:
        found |= {f"{words[0]!r} as the first word", f"{words[-1]!r} as the last word"}
    return frozenset(found)


def shares_of(prompts: Iterable[str]) -> dict[str, float]:
    """The share of the prompts that has each form."""
    every = [forms_of(prompt) for prompt in prompts]
    return {form: count / len(every) for form, count in Counter(form for forms in every for form in forms).items()}


@functools.cache
def _shares(prompts: tuple[str, ...]) -> dict[str, float]:
    return shares_of(prompts)


def _giveaways(one: _Read, others: Sequence[DomainPool]) -> Iterator[Problem]:
    total = sum(len(pool.prompts) for pool in others)
    given = []
    for form, share in _shares(one.pool.prompts).items():
        elsewhere = sum(_shares(pool.prompts).get(form, 0.0) * len(pool.prompts) for pool in others) / max(1, total)
        if (share >= GIVEAWAY and elsewhere <= ELSEWHERE) or share - elsewhere >= GIVEAWAY_GAP:
            given.append((share, form, elsewhere))
    for share, form, elsewhere in sorted(given, reverse=True):
        numbers = [n for n, prompt in enumerate(one.pool.prompts) if form in forms_of(prompt)]
        said = f"{form}: {share:.0%} of the prompts have it, {elsewhere:.0%} of other pools'"
        yield Problem(
            str(one.file), "giveaway", f"{one.where('prompts', numbers[0])} and {len(numbers) - 1} more: {said}"
        )


def shingles(text: str) -> Shingles:
    """Runs of SHINGLE_WORDS words; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(tuple(words[place : place + SHINGLE_WORDS]) for place in runs)


def near_repeats(texts: Sequence[str], groups: Sequence[object] | None = None) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of texts that say nearly the same.

    Texts of one group (all of them by default) share more than NEAR_INSIDE of the shorter one's shingles, those of two
    groups NEAR_ACROSS of all.
    """
    from scipy.sparse import csr_array, triu

    known: dict[tuple[str, ...], int] = {}
    rows = [[known.setdefault(run, len(known)) for run in shingles(text)] for text in texts]
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    columns, ends = np.array([place for row in rows for place in row]), np.concatenate([[0], np.cumsum(sizes)])
    held = csr_array((np.ones(len(columns), dtype=np.int32), columns, ends), shape=(len(texts), len(known)))
    shared = triu(held @ held.T, 1).tocoo()
    found = []
    for one, other, count in zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist(), strict=True):
        inside = groups is None or groups[one] == groups[other]
        whole = min(sizes[one], sizes[other]) if inside else sizes[one] + sizes[other] - count
        if count > (NEAR_INSIDE if inside else NEAR_ACROSS) * whole:
            found.append((one, other))
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def _repeats(read: Sequence[_Read], others: Sequence[DomainPool]) -> Iterator[Problem]:
    """Each prompt of the files with the first that it repeats; those of `others` stand before them."""
    before = [(pool.name, number, text) for pool in others for number, text in enumerate(pool.prompts)]
    own = [(one, number, text) for one in read for number, text in enumerate(one.pool.prompts)]
    groups = [name for name, _, _ in before] + [one.pool.name for one, _, _ in own]
    first: dict[int, int] = {}
    for earlier, later in near_repeats([text for _, _, text in (*before, *own)], groups):
        if later >= len(before):
            first.setdefault(later, earlier)
    for later, earlier in first.items():
        one, number, _ = own[later - len(before)]
        if earlier < len(before):
            name, place, text = before[earlier]
            told = f"prompts[{place}] of the shipped pool {name}"
        else:
            other, place, text = own[earlier - len(before)]
            told = other.where("prompts", place) + (f" of {other.file}" if other is not one else "")
        said = f"{one.where('prompts', number)}: nearly repeats {told}, {shown(text)}"
        yield Problem(str(one.file), "near-duplicate", said)


def _sentences(text: str) -> Iterator[str]:
    """Sentences of SENTENCE_WORDS words or more, numbers apart."""
    for sentence in SENTENCE_END.split(text):
        if len(re.findall(r"[^\W\d]+", sentence)) >= SENTENCE_WORDS:
            yield sentence.strip()


def _numberless(sentence: str) -> Shingles:
    return shingles(re.sub(r"\d+", "0", sentence))


@functools.cache
def _embedded() -> tuple[tuple[tuple[str, Shingles], ...], Mapping[tuple[str, ...], frozenset[int]]]:
    """The embedded model's sentences with their shingles, and for each shingle where it stands."""
    pools = (*load_pools(POOLS_DIR), *load_outside(POOLS_DIR / "outside"))
    texts = dict.fromkeys(s for pool in pools for text in (*pool.prompts, *pool.descriptions) for s in _sentences(text))
    known = tuple((text, _numberless(text)) for text in texts)
    places: dict[tuple[str, ...], set[int]] = {}
    for number, (_, runs) in enumerate(known):
        for run in runs:
            places.setdefault(run, set()).add(number)
    return known, {run: frozenset(numbers) for run, numbers in places.items()}


def embedded_sentence(text: str) -> str | None:
    """A sentence of the embedded model that the text holds, all but the same, or what else is of its language."""
    known, places = _embedded()
    for sentence in _sentences(text):
        runs = _numberless(sentence)
        near = Counter(number for run in runs for number in places.get(run, ()))
        for number, count in near.most_common(1):
            if count > NEAR_EMBEDDED * len(runs | known[number][1]):
                return known[number][0]
    names = sorted(EMBEDDED_NAMES & set(re.findall(r"\w+", text.lower())))
    return " and ".join(name.title() for name in names) if len(names) > 1 else None


def _embedded_sentences(one: _Read) -> Iterator[Problem]:
    for key in ("prompts", "descriptions"):
        for number, text in enumerate(getattr(one.pool, key)):
            if (found := embedded_sentence(text)) is not None:
                said = f"is of the embedded model's language ({shown(found)}), which no deployment speaks"
                yield Problem(str(one.file), "embedded", f"{one.where(key, number)}: {said}")
