"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from sspcompile.report.model import Report
from sspcompile.report.view import Table, blocks
from sspcompile.report.words import clean

ALARMS = ("LOSS", "FAILED", "FURTHER")


def render_text(report: Report, console: Console, *, only: Collection[str] | None = None) -> None:
    """Print the report, or only the blocks with these keys.

    Everything goes through Text objects, so that brackets in prompts are no markup.
    """
    console.print(Text(clean(report.title), style="bold"))
    for block in blocks(report):
        if only is not None and block.key not in only:
            continue
        console.print()
        console.print(Text(block.title, style="bold"))
        for sentence in block.sentences:
            style = "yellow" if any(alarm in sentence for alarm in ALARMS) else ""
            console.print(Padding(Text(sentence, style=style), (0, 0, 0, 2)))
        for table in block.tables:
            console.print(_table(table))


def _table(table: Table) -> RichTable:
    rich = RichTable(title=Text(table.caption), title_justify="left", header_style="")
    for header in table.headers:
        rich.add_column(Text(header), overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    return rich
