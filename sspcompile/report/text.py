"""A page on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from sspcompile.report.blocks import Page, Table
from sspcompile.report.first import FirstScreen
from sspcompile.report.panels import Bar, Panel, in_words
from sspcompile.report.verdict import alarming

# With these, 80 columns hold the longest label, a strip and `0.985 (0.793 to 0.999), no measurable change`.
LABEL, STRIP = 19, 12


def render_text(page: Page, console: Console, *, only: Collection[str] | None = None) -> None:
    """Print the page, or its first screen and only the blocks with these keys.

    Everything goes through Text objects, so that brackets in prompts are no markup.
    """
    console.print(Text(page.title, style="bold"))
    if page.first:
        console.print()
        console.print(*_first(page.first, console), sep="\n")
    for block in page.blocks:
        if only is not None and block.key not in only:
            continue
        console.print()
        console.print(Text(block.title, style="bold"))
        for sentence in block.sentences:
            console.print(Padding(Text(sentence, style=_style(sentence)), (0, 0, 0, 2)))
        for table in block.tables:
            console.print(_table(table))


def _style(sentence: str) -> str:
    return "yellow" if alarming(sentence) else ""


def _first(first: FirstScreen, console: Console) -> Iterator[RenderableType]:
    yield Text(f"{first.verdict}\n", style=f"bold {_style(first.verdict)}")
    for panel in first.panels:
        about = ", ".join(filter(None, (*panel.about, panel.aside))) if panel.bars else panel.absent
        yield Text.assemble((panel.title, "bold"), f": {about}")
        if panel.bars:
            yield Padding(_bars(panel, plain=console.options.ascii_only), (0, 0, 0, 2))


def _bars(panel: Panel, *, plain: bool) -> RichTable:
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_column(min_width=LABEL)
    grid.add_column(min_width=STRIP, no_wrap=True)
    grid.add_column(overflow="fold")
    for bar in panel.bars:
        grid.add_row(Text(bar.label), Text(_strip(bar, panel.origin, plain=plain)), Text(in_words(bar)))
    return grid


def _strip(bar: Bar, origin: float, *, plain: bool) -> str:
    """The scale of a panel: a mark inside its interval; without an interval filled from the origin to the value."""
    if bar.at is None:
        return ""
    empty, full, reach, mark, zero = "-#=o|" if plain else "░█━●│"
    cells = [empty] * STRIP
    if origin:
        cells[_column(origin)] = zero
    if bar.low is None or bar.high is None:
        start, end = sorted(round(place * STRIP) for place in (origin, bar.at))
        cells[start:end] = full * (end - start)
    else:
        start, end = _column(bar.low), _column(bar.high)
        cells[start : end + 1] = reach * (end + 1 - start)
        cells[_column(bar.at)] = mark
    return "".join(cells)


def _column(place: float) -> int:
    return min(STRIP - 1, int(place * STRIP))


def _table(table: Table) -> RichTable:
    rich = RichTable(title=Text(table.caption), title_justify="left", header_style="")
    for header in table.headers:
        rich.add_column(Text(header), overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    return rich
