"""The three figures of a report as one picture for an HTML page: side by side, stacked where there is no room for that.
The same panels give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape, quoteattr

from sspcompile.report.panels import Bar, Panel, spoken

HEAD, BAR, FOOT = 62, 60, 18  # pixels: title and two lines, one bar with its words, the scale
ABSENT = 46  # a title and the words instead of bars
TRACK, TRACK_TOP = 12, 24

# Values are filled bars, intervals lines with ends, and words say both: nothing is told by colour alone.
# Below 60rem the words of a panel do not fit into a third of a screen; on paper they are smaller instead.
STYLE = """
.ssp-panels{display:grid;grid-template-columns:repeat(3,1fr);gap:1.5rem 2.2rem}
.ssp-panels svg{display:block;overflow:visible}
.ssp-panels text{font:12px system-ui,sans-serif;fill:#57606a}
.ssp-panels .t{font-size:15px;font-weight:600;fill:#1b1f24}
.ssp-panels .l{font-size:13px;fill:#1b1f24}
.ssp-panels .v{font-size:15px;font-weight:600;fill:#1b1f24}
.ssp-panels .f{fill:#1b1f24}
.ssp-panels .e{font-size:11px}
.ssp-panels .track{fill:none;stroke:#8a929c}
.ssp-panels .bar{fill:#3f85c2}.ssp-panels .lost .bar{fill:#d9822b}
.ssp-panels .i{stroke:#1b1f24;stroke-width:2}
.ssp-panels .o{stroke:#57606a;stroke-dasharray:2 2}
@media screen and (max-width:60rem){.ssp-panels{grid-template-columns:1fr}}
@media print{.ssp-panels{gap:1.2rem}.ssp-panels text{font-size:10px}.ssp-panels .t,.ssp-panels .v{font-size:12px}
.ssp-panels .e{font-size:9px}}
@media screen and (prefers-color-scheme:dark){.ssp-panels text{fill:#a0a9b4}
.ssp-panels .t,.ssp-panels .l,.ssp-panels .v,.ssp-panels .f{fill:#e6e9ed}
.ssp-panels .track{stroke:#77808b}.ssp-panels .bar{fill:#2f77b8}.ssp-panels .lost .bar{fill:#b0641a}
.ssp-panels .i{stroke:#fff}.ssp-panels .o{stroke:#a0a9b4}}
"""


def render_panels(panels: Sequence[Panel]) -> str:
    """Inline SVG, a drawing per panel: its bars take the width that there is, its words keep their size."""
    parts = [
        f'<div class="ssp-panels" role="img" aria-label={quoteattr(" ".join(map(spoken, panels)))}>',
        f"<style>{STYLE}</style>",
    ]
    for panel in panels:
        parts.append(
            f'<svg xmlns="http://www.w3.org/2000/svg" class="{panel.key}" width="100%" height="{_height(panel)}">'
        )
        parts += [*filter(None, _panel(panel)), "</svg>"]
    return "\n".join([*parts, "</div>"]) + "\n"


def _height(panel: Panel) -> int:
    return HEAD + BAR * len(panel.bars) + FOOT if panel.bars else ABSENT


def _panel(panel: Panel) -> Iterator[str]:
    yield _left("t", 16, panel.title)
    if not panel.bars:
        yield _left("", 40, panel.absent)
        return
    if panel.aside:
        yield _right("", 16, panel.aside)
    for line, text in enumerate(panel.about):
        yield _left("", 36 + 16 * line, text)
    for index, bar in enumerate(panel.bars):
        yield from _bar(bar, panel.origin, HEAD + BAR * index)
    bottom = HEAD + BAR * len(panel.bars) + 14
    yield _left("e", bottom, panel.ends[0])
    if panel.middle:
        yield f'<text class="e" x="50%" y="{bottom}" text-anchor="middle">{escape(panel.middle)}</text>'
    yield _right("e", bottom, panel.ends[1])


def _bar(bar: Bar, origin: float, top: int) -> Iterator[str]:
    yield _left("l", top + 16, bar.label)
    yield _right("v", top + 16, bar.value)
    if bar.at is not None:
        yield from _drawn(bar.at, bar.low, bar.high, origin, top + TRACK_TOP)
    yield _left("", top + 52, bar.detail)
    yield _right("f", top + 52, bar.finding)


def _drawn(at: float, low: float | None, high: float | None, origin: float, top: int) -> Iterator[str]:
    start, width = min(origin, at), abs(at - origin)
    yield f'<rect class="track" x="0" y="{top}" width="100%" height="{TRACK}"/>'
    yield f'<rect class="bar" x="{start:.2%}" y="{top}" width="{width:.2%}" height="{TRACK}"/>'
    if origin:
        yield _line("o", origin, origin, top - 3, top + TRACK + 3)
    if low is not None and high is not None:
        middle = top + TRACK // 2
        yield _line("i", low, high, middle, middle)
        yield from (_line("i", end, end, middle - 4, middle + 4) for end in (low, high))


def _line(kind: str, left: float, right: float, top: int, bottom: int) -> str:
    return f'<line class="{kind}" x1="{left:.2%}" x2="{right:.2%}" y1="{top}" y2="{bottom}"/>'


def _left(kind: str, y: int, text: str) -> str:
    return f'<text class="{kind}" x="0" y="{y}">{escape(text)}</text>' if text else ""


def _right(kind: str, y: int, text: str) -> str:
    return f'<text class="{kind}" x="100%" y="{y}" text-anchor="end">{escape(text)}</text>' if text else ""
