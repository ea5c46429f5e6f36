"""A page on a terminal."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from sspcompile.report.page import Page, Table

ALARMS = ("LOSS", "FAILED", "FURTHER", "DO NOT SHIP", "FOR THIS SCENARIO ONLY", "NO MEASURABLE GAIN")


def render_text(page: Page, console: Console, *, only: Collection[str] | None = None) -> None:
    """Print the page, or only the blocks with these keys.

    Everything goes through Text objects, so that brackets in prompts are no markup.
    """
    console.print(Text(page.title, style="bold"))
    for block in page.blocks:
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
