"""Pages and their data in a folder."""

from __future__ import annotations

from pathlib import Path

from sspcompile.report.blocks import Page
from sspcompile.report.html import render_html
from sspcompile.report.json import render_json
from sspcompile.report.markdown import render_markdown
from sspcompile.report.model import Report
from sspcompile.report.page import report_page


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write report.json, report.md, report.html and, when the report has a mask, mask.svg. Returns their paths.

    The folder must exist; the same report gives the same bytes.
    """
    return write_page(report_page(report), render_json(report), folder, "report")


def write_page(page: Page, data: str, folder: Path, name: str) -> tuple[Path, ...]:
    """Write `data` as NAME.json, the page as NAME.md and NAME.html, and its pictures. Returns their paths."""
    contents = {f"{name}.json": data, f"{name}.md": render_markdown(page), f"{name}.html": render_html(page)}
    contents |= {picture.file: picture.svg for picture in page.pictures}
    for file, content in contents.items():
        (folder / file).write_bytes(content.encode("utf-8"))
    return tuple(folder / file for file in contents)
