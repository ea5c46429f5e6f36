"""The report as one HTML file: no scripts, nothing fetched, light and dark, everything from prompts escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sspcompile.report.model import Report
from sspcompile.report.svg import render_svg
from sspcompile.report.text import ALARMS
from sspcompile.report.view import blocks
from sspcompile.report.words import clean


def render_html(report: Report) -> str:
    """A complete document. Its content security policy forbids scripts and every request."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["alarming"] = lambda sentence: any(alarm in sentence for alarm in ALARMS)
    template = environment.from_string(Path(__file__).with_name("template.html").read_text("utf-8"))
    # The picture is made of numbers only (svg.py escapes the rest), so it may pass unescaped.
    picture = Markup(render_svg(report.mask)) if report.mask else None
    return template.render(title=clean(report.title), blocks=blocks(report), mask_svg=picture)
