"""The mask as a picture: one row per layer, one column per query head, and where channels of MLPs were cut a bar. The
same mask gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from xml.sax.saxutils import escape

from sspcompile.report.format import count, figures, layers_named, percent
from sspcompile.report.model import MaskSection

LARGEST_CELL, SMALLEST_CELL = 30, 10
TARGET_WIDTH, TARGET_HEIGHT = 640, 380  # with a verdict and three figures above it, this fits on one screen
LEFT, TOP = 58, 40
SIGN, LEGEND_WIDTH, LEGEND_ROW = 16, 280, 22
GROUP_GAP = 7
# Between heads and bars, a bar of an MLP that is whole, and cells beside bars: nine heads fit on a phone even so.
BAR_GAP, BAR_WIDTH, CELL_BESIDE = 16, 72, 20
HEADING = 80  # pixels that the words above the heads take
LABELS_APART, LINES_APART = 26, 12  # pixels between axis labels side by side, and one above the other
SHADES = 5

# Kept and removed differ in shape (filled against hollow with a cross), not in colour alone; the blues differ in
# lightness, which every kind of colour vision sees.
STYLE = """
.ssp-mask text{font:11px system-ui,sans-serif;fill:#1b1f24}
.ssp-mask .t{font-size:13px;font-weight:600}
.ssp-mask .r{fill:#fff;stroke:#8a929c;stroke-width:1}
.ssp-mask .x{stroke:#8a929c;stroke-width:1}
.ssp-mask .s{stroke:#57606a;stroke-width:1}
.ssp-mask .w{fill:#ffb000;stroke:#1b1f24;stroke-width:1}
.ssp-mask .k0{fill:#9cc3e6}.ssp-mask .k1{fill:#6ba5d7}.ssp-mask .k2{fill:#3f85c2}
.ssp-mask .k3{fill:#1f66a5}.ssp-mask .k4{fill:#0b4480}
.ssp-mask .m{fill:none;stroke:#8a929c;stroke-width:1}.ssp-mask .b{fill:#1f66a5}
@media screen and (prefers-color-scheme:dark){.ssp-mask text{fill:#e6e9ed}.ssp-mask .r{fill:#14181d;stroke:#77808b}
.ssp-mask .x{stroke:#77808b}.ssp-mask .s{stroke:#a0a9b4}.ssp-mask .w{stroke:#fff}
.ssp-mask .k0{fill:#1d568c}.ssp-mask .k1{fill:#2f77b8}.ssp-mask .k2{fill:#5796d0}
.ssp-mask .k3{fill:#8dbbe6}.ssp-mask .k4{fill:#c9e1f7}
.ssp-mask .m{stroke:#77808b}.ssp-mask .b{fill:#8dbbe6}}
"""


def render_svg(mask: MaskSection) -> str:
    """A self-contained SVG; each cell has a `<title>` with layer, head, fate and score, each bar one with its width."""
    bars = mask.widths is not None
    largest, room = (CELL_BESIDE, TARGET_WIDTH - BAR_GAP - BAR_WIDTH) if bars else (LARGEST_CELL, TARGET_WIDTH)
    cell = max(SMALLEST_CELL, min(largest, room // mask.heads, TARGET_HEIGHT // mask.layers))
    group = mask.heads // mask.kv_heads
    end = _x(mask.heads - 1, cell, group) + cell
    if bars:
        end = max(end, LEFT + HEADING) + BAR_GAP + BAR_WIDTH
    width = max(end + 12, LEFT + LEGEND_WIDTH)
    bottom = TOP + mask.layers * cell + 16
    legend, height = _legend(mask, bottom, width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ssp-mask" role="img" aria-label="{_label(mask)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        *_axes(mask, cell, group),
        *_separators(mask, cell, group),
        *_cells(mask, cell, group),
        *_bars(mask, cell, end - BAR_WIDTH),
        *legend,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _label(mask: MaskSection) -> str:
    kept = sum(map(len, mask.kept))
    label = f"{kept} of {mask.layers * mask.heads} heads kept, in {mask.layers} layers of {mask.heads} heads"
    if mask.removed:
        label += f"; removed whole: {layers_named(mask.removed)}"
    if mask.silent:
        label += f"; attention removed: {layers_named(mask.silent)}"
    if mask.widths is None or mask.intermediate is None:
        return label
    share = sum(mask.widths) / (mask.layers * mask.intermediate)
    where = "layer" if mask.experts == 1 else "expert"
    return f"{label}; {percent(share)} of the channels of the MLPs kept, of {count(mask.intermediate)} in each {where}"


def _x(head: int, cell: int, group: int) -> int:
    """Left edge of a column. Groups of one head (MHA) are not set apart."""
    return LEFT + head * cell + (head // group * GROUP_GAP if group > 1 else 0)


def _axes(mask: MaskSection, cell: int, group: int) -> Iterator[str]:
    step = -(-LABELS_APART // cell)
    yield f'<text class="t" x="{LEFT}" y="14">query head</text>'
    for head in range(0, mask.heads, step):
        yield f'<text x="{_x(head, cell, group) + cell / 2:g}" y="{TOP - 6}" text-anchor="middle">{head}</text>'
    yield f'<text class="t" x="4" y="{TOP - 6}">layer</text>'
    for layer in range(0, mask.layers, -(-LINES_APART // cell)):
        yield f'<text x="{LEFT - 8}" y="{TOP + (layer + 0.5) * cell + 4:g}" text-anchor="end">{layer}</text>'


def _separators(mask: MaskSection, cell: int, group: int) -> Iterator[str]:
    if group > 1:
        for head in range(group, mask.heads, group):
            x = _x(head, cell, group) - GROUP_GAP / 2
            yield f'<path class="s" d="M{x:g} {TOP}V{TOP + mask.layers * cell}"/>'


def _cells(mask: MaskSection, cell: int, group: int) -> Iterator[str]:
    shades = _shades(mask.scores, mask.layers, mask.heads)
    for layer in range(mask.layers):
        if not mask.kept[layer]:
            yield _gone(mask, layer, cell, group)
            continue
        kept = frozenset(mask.kept[layer])
        for head in range(mask.heads):
            x, y = _x(head, cell, group), TOP + layer * cell
            protected = bool(mask.whitelist and mask.whitelist[layer][head])
            shape = _kept(x, y, cell, shades[layer][head]) if head in kept else _removed(x, y, cell)
            dot = _dot(x + cell / 2, y + cell / 2, cell / 5) if protected else ""
            title = f"<title>{escape(_describe(mask, layer, head, head in kept, protected))}</title>"
            yield f"<g>{title}{shape}{dot}</g>"


def _gone(mask: MaskSection, layer: int, cell: int, group: int) -> str:
    """In the place of the heads of a layer that was removed whole, or its attention: a hollow bar, struck through."""
    left, right, y = LEFT + 1, _x(mask.heads - 1, cell, group) + cell - 1, TOP + layer * cell
    told = "removed whole" if layer in mask.removed else "attention removed"
    return f"<g><title>layer {layer}: {told}</title>{_struck(left, y, right - left, cell)}</g>"


def _struck(x: float, y: float, width: float, cell: float) -> str:
    inset = cell * 0.22
    rect = f'<rect class="r" x="{x:g}" y="{y + inset:g}" width="{width:g}" height="{cell - 2 * inset:g}"/>'
    return rect + f'<path class="x" d="M{x:g} {y + cell / 2:g}h{width:g}"/>'


def _bars(mask: MaskSection, cell: int, left: int) -> Iterator[str]:
    """What is left of every layer's MLP, from `left` on."""
    if mask.widths is None or mask.intermediate is None:
        return
    name = "MLP" if mask.experts == 1 else "each expert"
    yield f'<text class="t" x="{left}" y="14">{name}</text>'
    yield f'<text x="{left}" y="{TOP - 6}">0</text>'
    yield f'<text x="{left + BAR_WIDTH}" y="{TOP - 6}" text-anchor="end">{count(mask.intermediate)}</text>'
    for layer, width in enumerate(mask.widths):
        share = width / mask.intermediate
        if layer in mask.removed:
            continue
        told = f"layer {layer}, {name}: {count(width)} of {count(mask.intermediate)} channels kept ({percent(share)})"
        yield f"<g><title>{told}</title>{_bar(left, TOP + layer * cell, BAR_WIDTH, cell, share)}</g>"


def _bar(x: float, y: float, width: float, cell: float, share: float) -> str:
    """Filled as far as the MLP was kept, in an outline of the whole."""
    inset = cell * 0.22
    sides = f'x="{x:g}" y="{y + inset:g}" height="{cell - 2 * inset:g}"'
    return f'<rect class="m" {sides} width="{width:g}"/><rect class="b" {sides} width="{width * share:g}"/>'


def _describe(mask: MaskSection, layer: int, head: int, kept: bool, protected: bool) -> str:
    group = mask.heads // mask.kv_heads
    parts = [f"layer {layer}, head {head}, key/value head {head // group}", "kept" if kept else "removed"]
    if mask.scores:
        parts.append(f"score {figures(mask.scores[layer][head])}")
    if protected:
        parts.append("whitelisted")
    return ": ".join((parts[0], ", ".join(parts[1:])))


def _kept(x: float, y: float, cell: float, shade: int) -> str:
    return f'<rect class="k{shade}" x="{x + 1:g}" y="{y + 1:g}" width="{cell - 2:g}" height="{cell - 2:g}" rx="2"/>'


def _removed(x: float, y: float, cell: float) -> str:
    inset = cell * 0.22
    a, b, c, d = x + inset, y + inset, x + cell - inset, y + cell - inset
    rect = f'<rect class="r" x="{a:g}" y="{b:g}" width="{c - a:g}" height="{d - b:g}"/>'
    return rect + f'<path class="x" d="M{a:g} {b:g}L{c:g} {d:g}M{c:g} {b:g}L{a:g} {d:g}"/>'


def _dot(x: float, y: float, radius: float) -> str:
    return f'<circle class="w" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'


def _shades(scores: Sequence[Sequence[float]] | None, layers: int, heads: int) -> list[list[int]]:
    """0 (light) to SHADES - 1 by the rank of the score: scores span orders of magnitude."""
    if scores is None:
        return [[SHADES // 2] * heads for _ in range(layers)]
    distinct = sorted({value for row in scores for value in row})
    rank = {value: index for index, value in enumerate(distinct)}
    return [[SHADES * rank[value] // len(distinct) for value in row] for row in scores]


def _legend(mask: MaskSection, top: int, width: int) -> tuple[list[str], int]:
    """What the signs mean, in as many rows as the width asks for, and where they end."""
    drawn, x, y = [], LEFT, top
    for sign, indent, room, text in _signs(mask):
        if x > LEFT and x + room > width:
            x, y = LEFT, y + LEGEND_ROW
        drawn.append(f'{sign(x, y)}<text x="{x + indent}" y="{y + 12}">{text}</text>')
        x += room
    return drawn, y + LEGEND_ROW


def _signs(mask: MaskSection) -> Iterator[tuple[Callable[[int, int], str], int, int, str]]:
    """How a sign is drawn, where its words begin, how wide both are, and the words."""
    if mask.scores is None:
        yield lambda x, y: _kept(x, y, SIGN, SHADES // 2), 24, 80, "kept"
    else:
        yield (
            lambda x, y: _kept(x, y, SIGN, 0) + _kept(x + 18, y, SIGN, SHADES - 1),
            42,
            190,
            "kept (low, high score)",
        )
    yield lambda x, y: _removed(x, y, SIGN), 24, 90, "removed"
    if mask.removed or mask.silent:
        words = "layer removed whole" if not mask.silent else "attention, or layer, removed"
        words = words if mask.removed else "attention removed"
        yield lambda x, y: _struck(x, y, 30, SIGN), 38, 190 if mask.removed and mask.silent else 150, words
    if mask.whitelist and any(map(any, mask.whitelist)):
        yield lambda x, y: _dot(x + 6, y + SIGN / 2, 4), 18, 100, "whitelisted"
    if mask.widths is not None:
        yield lambda x, y: _bar(x, y, 30, SIGN, 0.6), 38, 190, "channels of the MLP kept"
    if mask.heads > mask.kv_heads > 1:
        yield lambda x, y: "", 0, 200, "lines separate key/value groups"
