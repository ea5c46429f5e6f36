"""What a report opens with: enough to be looked at before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from sspcompile.report.format import clean
from sspcompile.report.model import Report
from sspcompile.report.panels import Panel, panels_of
from sspcompile.report.panels_svg import render_panels
from sspcompile.report.svg import render_svg
from sspcompile.report.verdict import headline


@dataclass(frozen=True)
class Picture:
    """`svg` is a self-contained drawing made of numbers and escaped text, `file` the name it goes by beside a page."""

    file: str
    svg: str
    label: str


@dataclass(frozen=True)
class FirstScreen:
    """The conclusion, the three figures and their drawing, the heat map."""

    verdict: str
    panels: tuple[Panel, ...]
    drawing: str
    mask: Picture | None = None


def first_screen(report: Report) -> FirstScreen | None:
    """None without a quality measurement of a build: then there is no conclusion to show."""
    told = headline(report)
    if told is None:
        return None
    panels = panels_of(report)
    return FirstScreen(clean(told), panels, render_panels(panels), heat_map(report))


def heat_map(report: Report) -> Picture | None:
    """The mask, drawn."""
    mask = report.mask
    if mask is None:
        return None
    kept = sum(map(len, mask.kept))
    label = f"{kept} of {mask.layers * mask.heads} query heads are kept; a row is a layer, a column a head"
    return Picture("mask.svg", render_svg(mask), label)
