"""A page as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sspcompile.report.blocks import Block, Page, Table
from sspcompile.report.first import FirstScreen
from sspcompile.report.panels import Panel

SPECIAL = re.compile(r"([\\`*_\[\]|~#!])")


def render_markdown(page: Page) -> str:
    """Text from prompts cannot start a heading, a link, a table cell or HTML."""
    lines = [f"# {escape(page.title)}", ""]
    if page.first:
        lines += _first(page.first)
    for block in page.blocks:
        lines += _block(block)
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Markdown's own characters behind backslashes, HTML's as entities."""
    text = SPECIAL.sub(r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _first(first: FirstScreen) -> Iterator[str]:
    yield from (f"**{escape(first.verdict)}**", "")
    yield from ("| | | | |", "| --- | --- | --- | --- |")
    for panel in first.panels:
        for cells in _rows(panel):
            yield f"| {' | '.join(map(escape, cells))} |"
    yield ""
    if first.mask:
        yield from (f"![{first.mask.label}]({first.mask.file})", "")


def _rows(panel: Panel) -> Iterator[tuple[str, ...]]:
    """The name of a panel stands in its first row."""
    if not panel.bars:
        yield (panel.title, "", panel.absent, "")
    for index, bar in enumerate(panel.bars):
        told = ", ".join(filter(None, (bar.detail, bar.finding)))
        yield ("" if index else f"{panel.title} ({', '.join(panel.about)})", bar.label, bar.value, told)


def _block(block: Block) -> Iterator[str]:
    yield from (f"## {escape(block.title)}", "")
    for sentence in block.sentences:
        yield f"- {escape(sentence)}"
    if block.sentences:
        yield ""
    if block.picture:
        yield from (f"![{block.picture.label}]({block.picture.file})", "")
    for table in block.tables:
        yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    yield from (f"{escape(table.caption)}:", "")
    yield "| " + " | ".join(escape(header) or " " for header in table.headers) + " |"
    yield "|" + " --- |" * len(table.headers)
    for row in table.rows:
        yield "| " + " | ".join(map(escape, row)) + " |"
    yield ""
