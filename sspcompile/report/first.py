"""What a report opens with: enough to be looked at before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from sspcompile.report.format import clean, count, layers_named, ranges
from sspcompile.report.model import MaskSection, Report
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
    label = f"{kept_units(mask)} are kept; a row is a layer, a column a head"
    if mask.widths is not None:
        label += ", a bar what is left of the layer's MLP"
    return Picture("mask.svg", render_svg(mask), label)


def gone_told(mask: MaskSection) -> list[str]:
    """Sentences on what is gone whole: layers, and the attention of layers."""
    told = []
    if mask.removed:
        told.append(f"Removed whole: {layers_named(mask.removed)}; what stays is numbered from 0 in the model.")
    if mask.silent:
        told.append(f"Attention removed, MLP kept: {layers_named(mask.silent)}.")
    return told


def heads_told(mask: MaskSection, layer: int) -> str:
    """The kept heads of a layer, or why there are none."""
    if layer in mask.removed:
        return "layer removed"
    return ranges(mask.kept[layer]) if mask.kept[layer] else "attention removed"


def kept_units(mask: MaskSection) -> str:
    """How many heads, and where channels were cut how many of those, out of how many; of layers where some were removed
    whole, and of parts only where those that stay lost some.
    """
    told = f"{sum(map(len, mask.kept))} of {mask.layers * mask.heads} query heads"
    if mask.removed:
        layers = f"{mask.layers - len(mask.removed)} of {mask.layers} layers"
        told = layers if _only_whole(mask) and not mask.silent else f"{layers}, {told}"
    if mask.silent:
        there = mask.layers - len(mask.removed)
        attending = f"{there - len(mask.silent)} of {there} layers"
        told = f"All heads of {attending}" if _only_whole(mask) and not mask.removed else f"{told} in {attending}"
    if mask.widths is None or mask.intermediate is None:
        return told
    kept, whole = mask.experts * sum(mask.widths), mask.experts * mask.layers * mask.intermediate
    return f"{told} and {count(kept)} of {count(whole)} channels of the {'MLPs' if mask.experts == 1 else 'experts'}"


def _only_whole(mask: MaskSection) -> bool:
    """Whether nothing but whole layers and whole attention was removed."""
    return all(len(row) in (0, mask.heads) for row in mask.kept) and mask.widths is None
