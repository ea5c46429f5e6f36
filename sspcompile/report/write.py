"""The report's files in a folder."""

from __future__ import annotations

from pathlib import Path

from sspcompile.report.html import render_html
from sspcompile.report.json import render_json
from sspcompile.report.markdown import render_markdown
from sspcompile.report.model import Report
from sspcompile.report.svg import render_svg


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write report.json, report.md, report.html and, when the report has a mask, mask.svg. Returns their paths.

    The folder must exist; the same report gives the same bytes.
    """
    contents = {
        "report.json": render_json(report),
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    if report.mask:
        contents["mask.svg"] = render_svg(report.mask)
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode("utf-8"))
    return tuple(folder / name for name in contents)
