"""A page as one HTML file: no scripts, nothing fetched, light and dark, everything from prompts escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sspcompile.report.blocks import Page
from sspcompile.report.verdict import alarming


def render_html(page: Page) -> str:
    """A complete document. Its content security policy forbids scripts and every request."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["alarming"] = alarming
    # Drawings are made of numbers, and what is text in them is escaped where they are drawn.
    environment.filters["drawing"] = Markup
    template = environment.from_string(Path(__file__).with_name("template.html").read_text("utf-8"))
    return template.render(page=page)
