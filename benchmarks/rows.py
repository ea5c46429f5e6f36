"""Figures by name, each written as soon as it is known, so that a benchmark that is interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Row = dict[str, Any]


class Results:
    """Rows by name, in a file that holds all of them at any moment."""

    def __init__(self, path: Path, settings: Row, *, goes_on: bool) -> None:
        self._path = path
        self._rows: Row = {"settings": settings}
        if goes_on and path.is_file():
            known = json.loads(path.read_text("utf-8"))
            self._rows = known if known.get("settings") == settings else self._rows

    def __getitem__(self, name: str) -> Row:
        row: Row = self._rows[name]
        return row

    def row(self, name: str, measure: Callable[[], Row], line: Callable[[Row], str]) -> None:
        """Measure a row unless it is known, keep it, and print what it says."""
        if name not in self._rows:
            self._rows[name] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._rows, indent=1) + "\n", "utf-8")
        click.echo(line(self._rows[name]))
