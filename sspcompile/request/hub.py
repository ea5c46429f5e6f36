"""A data set of the hub as a scenario, `hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]`: which of its files are meant, and
as many of their records as a build can use.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sspcompile.checkpoint.hub import REVISION, Repository, fetched, listed
from sspcompile.errors import ScenarioError
from sspcompile.request.documents import SHOWN_CHARACTERS, shown
from sspcompile.request.prompts import FORMS, Line, Prompt, prompt_of, read_line, say_remarks
from sspcompile.request.records import FORMATS, SMALLER, drawn
from sspcompile.request.splits import HOLD_EVERY, OWN_GUARD_PROMPTS, thinned

HUB = "hub:"
ACCEPTED = "Accepted: hub:OWNER/NAME, and behind it @REVISION, :SPLIT or :CONFIG/SPLIT."
NAMED = rf"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>{REVISION}))?(?::(?:(?P<config>[^/:\s]+)/)?(?P<split>[^/:\s]+))?"
CARD = "README.md"
# Every part of a build is full with so many: of these every fourth is held out, and every second of those guards.
RECORDS = 2 * HOLD_EVERY * OWN_GUARD_PROMPTS
# Of a split in many files these many are read, evenly spaced, and fewer where they are large.
FILES, DOWNLOADED_BYTES = 4, 2 << 30
# The words by which file names tell their split, as the library `datasets` reads them.
SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files of data sets that describe them, which `datasets` leaves out too.
DESCRIBING = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
DEFAULT_CONFIG, DEFAULT_SPLIT = "default", "train"
SHOWN_TABLES = 8

log = logging.getLogger("sspcompile")

# Config and split.
Table = tuple[str, str]


@dataclass(frozen=True)
class HubSet:
    """The prompts of a data set, and in words which of its records they are."""

    prompts: tuple[Prompt, ...]
    origin: str


def read_hub(value: str) -> HubSet:
    """What `--scenario hub:...` names. Records are recognised as the lines of .jsonl files are; those that cannot be
    read are left out and counted.

    Hub and cache behaviour is huggingface_hub's own (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Raises ScenarioError.
    """
    asked = re.fullmatch(NAMED, value.removeprefix(HUB).strip())
    if asked is None:
        raise ScenarioError(f"{shown(value)} names no data set of the hub.", hint=ACCEPTED)
    name, revision = asked["name"], asked["revision"]
    there = listed(_repository(name, revision), [f"*{suffix}" for suffix in FORMATS] + [CARD])
    at = _repository(name, there.commit or revision)
    configs = _configs(fetched(at, [CARD]) / CARD) if CARD in there.files else ()
    paths = map(PurePosixPath, there.files)
    files = sorted(str(path) for path in paths if path.suffix in FORMATS and path.name not in DESCRIBING)
    if not files:
        hint = f"The hub keeps a copy of most: hub:{name}@refs/convert/parquet. Or {SMALLER[0].lower()}{SMALLER[1:]}"
        raise ScenarioError(f"{name} holds no {', '.join(FORMATS)} file.", hint=hint)
    said = name if there.whole else f"What the local cache holds of {name}"
    table, chosen = _chosen(said, tables_of(files, configs), configs, asked["config"], asked["split"])
    few = _few(name, chosen, there.files)
    folder = fetched(at, [glob.escape(file) for file in few])
    if absent := [file for file in few if not (folder / file).is_file()]:
        raise ScenarioError(
            f"The hub is out of reach, and {absent[0]} of {name} is not in the local cache.",
            hint=f"Download it first with `hf download {name} --repo-type dataset`.",
        )
    records, total = drawn([folder / file for file in few], RECORDS)
    prompts, left_out = _read(f"{name}:{'/'.join(table)}", records)
    commit = f"@{there.commit[:12]}" if there.commit else ""
    part = f" in {len(few)} of {len(chosen)} files" if len(few) < len(chosen) else ""
    origin = f"{HUB}{name}{commit}:{'/'.join(table)}, {len(records)} of {total} records{part}"
    if left_out:
        origin += f", {left_out} of them left out"
        log.info("%s: no prompt could be read from those.", origin)
    return HubSet(prompts, origin)


def _repository(name: str, revision: str | None) -> Repository:
    return Repository(name, revision, "dataset", ScenarioError, "a .jsonl file")


def _read(where: str, records: Sequence[object]) -> tuple[tuple[Prompt, ...], int]:
    """The prompts of the records, each once, and how many records cannot be read."""
    lines: list[Line] = []
    prompts, problems = [], []
    for record in records:
        try:
            line = read_line(record)
            prompts.append(prompt_of(line))
            lines.append(line)
        except ValueError as error:
            problems.append(str(error))
    if not prompts:
        why = f": a record {problems[0]}" if problems else ""
        raise ScenarioError(f"{where} holds no prompts{why}.", hint=f"Recognised columns: {', '.join(FORMS)}.")
    say_remarks(where, lines)
    return tuple(dict.fromkeys(prompts)), len(problems)


def _configs(card: Path) -> tuple[Mapping[str, Any], ...]:
    """What the card says of the files: a mapping for each configuration."""
    try:
        block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", card.read_text("utf-8-sig"), re.DOTALL)
        said = YAML(typ="safe", pure=True).load(block[1]) if block else None
    except (YAMLError, ValueError) as error:  # ValueError: not UTF-8
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        raise ScenarioError(f"{card.name} of the data set cannot be read ({reason}).", hint=SMALLER) from None
    configs = said.get("configs") if isinstance(said, Mapping) else None
    return tuple(c for c in configs if isinstance(c, Mapping)) if isinstance(configs, list) else ()


def tables_of(files: Sequence[str], configs: Sequence[Mapping[str, Any]] = ()) -> dict[Table, list[str]]:
    """Which files make up each configuration and split: as the card says, or else as their names tell."""
    found: dict[Table, list[str]] = {}
    for config in configs:
        for split, pattern in _patterns(config):
            name = str(config.get("config_name", DEFAULT_CONFIG))
            matching = [file for file in files if fnmatch.fnmatchcase(file, pattern.replace("**/", "*"))]
            for file in matching:
                place = found.setdefault((name, split or _told(file)[1]), [])
                if file not in place:
                    place.append(file)
    if not found:
        for file in files:
            found.setdefault(_told(file), []).append(file)
    return {table: _one_format(sorted(those)) for table, those in found.items()}


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
    """(split, pattern of paths) of a configuration; None where the file's name says which split it is of."""
    given = config.get("data_files")
    if given is None and isinstance(config.get("data_dir"), str):
        yield None, f"{config['data_dir'].strip('/')}/*"
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, str):
            yield None if "*" in entry else DEFAULT_SPLIT, entry
        elif isinstance(entry, Mapping):
            paths = entry.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                if isinstance(path, str):
                    yield str(entry.get("split", DEFAULT_SPLIT)), path


def _told(file: str) -> Table:
    """What a file's name and folders say, `train` where they say nothing."""
    path = PurePosixPath(file)
    places = [path.stem, *reversed(path.parent.parts)]
    for place in places:
        words = set(re.split(r"[^a-z]+", place.lower()))
        split = next((name for name, known in SPLIT_WORDS.items() if words & set(known)), None)
        if split is not None:
            break
    else:
        place, split = "", DEFAULT_SPLIT
    folders = [part for part in path.parent.parts if part not in (place, "data")]
    return "-".join(folders) or DEFAULT_CONFIG, split


def _one_format(files: Sequence[str]) -> list[str]:
    """The files of one format, where a split is there in several: the one that needs least to be read."""
    found: dict[str, list[str]] = {suffix: [] for suffix in FORMATS}
    for file in files:
        found[PurePosixPath(file).suffix].append(file)
    return next(same for same in found.values() if same)


def _chosen(
    name: str,
    tables: Mapping[Table, list[str]],
    configs: Sequence[Mapping[str, Any]],
    config: str | None,
    split: str | None,
) -> tuple[Table, list[str]]:
    """The table that is asked for, or the one that is meant where nothing is said. Raises ScenarioError."""
    if config is None and split is not None and split in {c for c, _ in tables} - {s for _, s in tables}:
        config, split = split, None
    names = list(dict.fromkeys(c for c, _ in tables))
    marked = [str(c.get("config_name")) for c in configs if c.get("default") is True]
    if config is None and len(names) > 1:
        config = next((c for c in (*marked, DEFAULT_CONFIG) if c in names), None)
    elif config is None:
        config = names[0]
    splits = [s for c, s in tables if c == config]
    if split is None:
        split = DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0] if len(splits) == 1 else None
    found = tables.get((config, split)) if config is not None and split is not None else None
    if found is None or config is None or split is None:
        every = [f":{c}/{s}" for c, s in tables]
        more = f" and {len(every) - SHOWN_TABLES} more" if len(every) > SHOWN_TABLES else ""
        said = "/".join(part for part in (config, split) if part)
        raise ScenarioError(
            f"{name} has no split {said}." if split else f"{name} has several, and none is named.",
            hint=f"It has {', '.join(every[:SHOWN_TABLES])}{more}.",
        )
    return (config, split), found


def _few(name: str, files: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    for count in range(min(FILES, len(files)), 0, -1):
        few = thinned(files, count)
        if sum(sizes[file] for file in few) <= DOWNLOADED_BYTES:
            return few
    raise ScenarioError(f"{files[0]} of {name} is larger than {DOWNLOADED_BYTES >> 30} GB.", hint=SMALLER)
