"""A page as one HTML file: no scripts, nothing fetched, light and dark, everything from prompts escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sspcompile.report.page import Page
from sspcompile.report.text import ALARMS


def render_html(page: Page) -> str:
    """A complete document. Its content security policy forbids scripts and every request."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["alarming"] = lambda sentence: any(alarm in sentence for alarm in ALARMS)
    # Drawings are made of numbers, and what is text in them is escaped where they are drawn.
    environment.filters["drawing"] = lambda picture: Markup(picture.svg)
    template = environment.from_string(Path(__file__).with_name("template.html").read_text("utf-8"))
    return template.render(page=page)
