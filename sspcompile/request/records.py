"""Records of the files of a data set (.jsonl, .json, .parquet), a few of many, evenly spaced.

A record is what one line of a .jsonl file holds, whatever the format of its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspcompile.errors import ScenarioError
from sspcompile.request.answers import looks_like_answer
from sspcompile.request.prompts import READ

if TYPE_CHECKING:
    from pyarrow import Field
    from pyarrow.parquet import ParquetFile

LINE_BYTES = 16 * 1024 * 1024
WHOLE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Format:
    """`count`: how many records a file has. `read`: those at these places, which ascend, as parsed JSON has them."""

    count: Callable[[Path], int]
    read: Callable[[Path, Sequence[int]], Iterator[object]]


def drawn(files: Sequence[Path], most: int) -> tuple[list[object], int]:
    """At most `most` records of the files, evenly spaced over all of them in their order, and how many there are.

    Raises ScenarioError for a file that cannot be read, in one line with its name.
    """
    counts = [FORMATS[file.suffix].count(file) for file in files]
    total = sum(counts)
    wanted = min(most, total)
    places = [number * total // wanted for number in range(wanted)]
    found: list[object] = []
    before = 0
    for file, count in zip(files, counts, strict=True):
        inside = [place - before for place in places if before <= place < before + count]
        if inside:
            found += FORMATS[file.suffix].read(file, inside)
        before += count
    return found, total


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise ScenarioError(f"{path.name} has a line of more than {LINE_BYTES >> 20} MB.", hint=SMALLER)
            if line.strip():
                yield line


def _count_lines(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _read_lines(path: Path, places: Sequence[int]) -> Iterator[object]:
    wanted = set(places)
    for place, line in enumerate(_lines(path)):
        if place in wanted:
            yield _parsed(path, line, f", record {place + 1}")


def _parsed(path: Path, content: bytes, where: str = "") -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8, too large or too deep"
        raise ScenarioError(f"{path.name}{where} is not JSON ({reason}).", hint=SMALLER) from None


def _listed(path: Path) -> list[object] | None:
    """The records of a .json file that is one list; None where it holds an object a line."""
    with path.open("rb") as file:
        start = file.read(1024).decode("utf-8-sig", "ignore").lstrip()
    if not start.startswith("["):
        return None
    if path.stat().st_size > WHOLE_BYTES:
        raise ScenarioError(f"{path.name} is one list of more than {WHOLE_BYTES >> 20} MB.", hint=SMALLER)
    found = _parsed(path, path.read_bytes())
    return found if isinstance(found, list) else None


def _count_json(path: Path) -> int:
    found = _listed(path)
    return _count_lines(path) if found is None else len(found)


def _read_json(path: Path, places: Sequence[int]) -> Iterator[object]:
    found = _listed(path)
    return _read_lines(path, places) if found is None else iter([found[place] for place in places])


def _parquet(path: Path) -> ParquetFile:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ScenarioError(
            f"{path.name} is a parquet file, and pyarrow is not installed.",
            hint="Run `pip install 'sspcompile[datasets]'`.",
        ) from None
    try:
        return ParquetFile(path)
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ScenarioError(f"{path.name} is not a readable parquet file ({reason}).", hint=SMALLER) from None


def _count_parquet(path: Path) -> int:
    return int(_parquet(path).metadata.num_rows)


def _read_parquet(path: Path, places: Sequence[int]) -> Iterator[Mapping[str, object]]:
    file = _parquet(path)
    columns = [field.name for field in file.schema_arrow if field.name in READ or _may_answer(field)]
    before = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [place - before for place in places if before <= place < before + count]
        if inside and columns:
            yield from file.read_row_group(group, columns=columns).take(inside).to_pylist()
        elif inside:
            yield from (dict.fromkeys(file.schema_arrow.names) for _ in inside)
        before += count


def _may_answer(field: Field) -> bool:
    """Whether a column is called like an answer and holds text or numbers: it is read to say that it is not taken for
    one. Others are not read, pictures least of all.
    """
    from pyarrow import types

    kind = field.type.value_type if types.is_list(field.type) or types.is_large_list(field.type) else field.type
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return looks_like_answer(field.name) and any(holds(kind) for holds in plain)


SMALLER = "Write a few hundred of its records to a .jsonl file, and give that."
FORMATS: Mapping[str, Format] = {
    ".jsonl": Format(_count_lines, _read_lines),
    ".json": Format(_count_json, _read_json),
    ".parquet": Format(_count_parquet, _read_parquet),
}
