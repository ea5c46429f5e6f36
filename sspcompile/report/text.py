"""The report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from sspcompile.report.model import Report
from sspcompile.report.view import Table, blocks
from sspcompile.report.words import clean

ALARMS = ("LOSS", "FAILED", "FURTHER")


# What a build shows by itself; the rest is in the files, or printed with --verbose.
SUMMARY = ("verdict", "quality", "sizes", "latency")


def render_text(report: Report, console: Console, *, summary: bool = False) -> None:
    """Print the report, or the blocks of its summary.

    Everything goes through Text objects, so that brackets in prompts are no markup.
    """
    console.print(Text(clean(report.title), style="bold"))
    for block in blocks(report):
        if summary and block.key not in SUMMARY:
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
