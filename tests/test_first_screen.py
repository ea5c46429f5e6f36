"""The first screen: a verdict, three figures and the heat map, with the report's own numbers, in every form."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from test_report import EVIL, Markup, bench_result, full_report, mask, quality, sizes

from sspcompile.cli.build import SUMMARY
from sspcompile.cli.tables import print_report
from sspcompile.intervals import Estimate
from sspcompile.report import Report, write_report
from sspcompile.report.build import latency_section
from sspcompile.report.comparison import comparison_page, points_of
from sspcompile.report.html import render_html
from sspcompile.report.markdown import render_markdown
from sspcompile.report.model import Pair, QualityRow
from sspcompile.report.page import report_page
from sspcompile.report.panels import Panel, in_words, panels_of, spoken
from sspcompile.report.panels_svg import render_panels
from sspcompile.report.speed import LatencyRow, LatencySection
from sspcompile.report.svg import render_svg
from sspcompile.report.text import render_text

SVG = "{http://www.w3.org/2000/svg}"


def row(metric: str, improvement: Estimate, verdict: str, **names: str | None) -> LatencyRow:
    quantiles = dict.fromkeys(
        f"{whose}_{what}" for whose in ("reference", "contender") for what in ("median", "p10", "p90")
    )
    told = {"load": "batch 1, 64+16 tokens", "reference": "dense", "contender": "sliced"} | names
    return LatencyRow(
        metric=metric,
        unit="s",
        samples=4,
        improvement=improvement,
        verdict=verdict,
        **(quantiles | dict.fromkeys(quantiles, 1.0)),
        **told,
    )


def timed(*rows: LatencyRow) -> LatencySection:
    return LatencySection(settings={}, rows=rows)


FASTER = row("time to first token", Estimate(2.0, 1.5, 3.0), "better")
SLOWER = row("inter-token latency", Estimate(0.5, 0.4, 0.8), "worse")


def judged(**changes: object) -> QualityRow:
    return quality("ours", 0.1, "ours", agreement=0.95).model_copy(update=changes)


def build(**changes: object) -> Report:
    """A build that keeps 7/8 of the weights and half of the cache, and turns every twentieth token."""
    given = {"title": "desk", "quality": (judged(),), "sizes": sizes(), "mask": mask()} | changes
    return Report(**given)


def panel(report: Report, key: str) -> Panel:
    return next(one for one in panels_of(report) if one.key == key)


# --- Values ----------------------------------------------------------------------------------------------------------


def test_what_is_left_are_the_shares_of_the_plan_counted() -> None:
    left = panel(build(), "left")
    assert [(bar.label, in_words(bar)) for bar in left.bars] == [
        ("weights", "87.5 % (3.50 MiB of 4.00 MiB)"),
        ("KV cache per token", "50 % (1.00 KiB of 2.00 KiB)"),
    ]
    assert [(bar.at, bar.low, bar.high) for bar in left.bars] == [(0.875, None, None), (0.5, None, None)]
    assert left.about == ("of the dense model", "exact counts") and left.ends == ("0", "dense")


def test_what_was_lost_are_the_turned_shares_with_turned_intervals() -> None:
    off = {"off_kl": Estimate(0.11, 0.1, 0.2), "off_agreement": Estimate(0.8, 0.75, 0.9)}
    lost = panel(build(quality=(judged(**off),)), "lost")
    assert [in_words(bar) for bar in lost.bars] == ["5 % (4 % to 6 %)", "20 % (10 % to 25 %)"]
    assert [bar.label for bar in lost.bars] == ["on the scenario", "off the scenario"]
    assert lost.ends == ("0 %", "25 %")
    places = [place for bar in lost.bars for place in (bar.at, bar.low, bar.high)]
    assert places == pytest.approx([0.2, 0.16, 0.24, 0.8, 0.4, 1.0])


def test_what_was_not_cut_is_whole_and_what_did_not_change_has_no_false_interval() -> None:
    whole = sizes().model_copy(update={"weight_bytes": Pair(dense=4_194_304, sliced=4_194_304)})
    assert panel(build(sizes=whole), "left").bars[0].value == "100 %"
    same = judged(top1_agreement=Estimate(1.0, 1.0, 1.0))
    assert in_words(panel(build(quality=(same,)), "lost").bars[0]) == "0 % (none was seen)"


@pytest.mark.parametrize(
    ("agreement", "end"), [(1.0, "10 %"), (0.95, "10 %"), (0.9, "25 %"), (0.7, "50 %"), (0.3, "100 %")]
)
def test_a_small_loss_looks_small_and_none_leaves_the_scale(agreement: float, end: str) -> None:
    lost = panel(build(quality=(quality("ours", 0.1, "ours", agreement=agreement),)), "lost")
    assert lost.ends[1] == end
    assert all(0 <= place <= 1 for place in (lost.bars[0].at, lost.bars[0].low, lost.bars[0].high) if place is not None)


def test_what_was_not_measured_is_said() -> None:
    bare = judged(top1_agreement=Estimate(0.95))
    speed, lost = panel(build(quality=(bare,)), "speed"), panel(build(quality=(bare,)), "lost")
    assert speed.bars == () and speed.absent == "not measured yet: sspcompile bench"
    assert in_words(lost.bars[0]) == "5 % (no interval: too few samples)"
    assert in_words(lost.bars[1]) == "not measured" and lost.bars[1].at is None
    assert panel(build(sizes=None), "left").absent == "not known"
    assert panel(build(latency=timed()), "speed").absent == "nothing to compare was measured"


def test_speed_lies_on_a_scale_of_ratios_around_the_dense_model() -> None:
    speed = panel(build(latency=timed(FASTER, SLOWER)), "speed")
    assert [in_words(bar) for bar in speed.bars] == [
        "2.00 (1.50 to 3.00), faster",
        "0.500 (0.400 to 0.800), LOSS: slower",
    ]
    assert speed.about == ("sliced as a multiple of dense", "99 % intervals")
    assert speed.aside == "batch 1, 64+16 tokens"
    assert speed.ends == ("3 times slower", "3 times faster") and speed.origin == 0.5
    up, down = speed.bars
    assert up.at == pytest.approx(0.5 + math.log(2) / math.log(3) / 2)
    assert (up.high, down.at) == (1.0, pytest.approx(1 - (up.at or 0)))


def test_speed_is_of_one_pair_under_one_load_and_says_how_many_there_are() -> None:
    other = row("time to first token", Estimate(9.0), "better", reference="keep-half")
    long = row("time to first token", Estimate(4.0), "better", load="batch 8, 512+64 tokens")
    memory = row("peak resident memory", Estimate(7.0), "better", load=None)
    speed = panel(build(latency=timed(memory, other, FASTER, SLOWER, long)), "speed")
    assert [bar.value for bar in speed.bars] == ["2.00", "0.500"]
    assert speed.aside == "batch 1, 64+16 tokens (1 of 3)"
    only = panel(build(latency=timed(memory, other)), "speed")
    assert only.about[0] == "sliced as a multiple of keep-half" and only.aside == "batch 1, 64+16 tokens"
    assert in_words(only.bars[0]) == "9.00 (no interval: too few samples), faster"


def test_an_interval_that_covers_no_change_is_called_so() -> None:
    speed = panel(build(latency=latency_section(bench_result(prefill=1.0, decode=1.0))), "speed")
    assert {bar.finding for bar in speed.bars} == {"no measurable change"}
    for bar in speed.bars:
        assert bar.low is not None and bar.high is not None and bar.low <= 0.5 <= bar.high


# --- The page --------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Start tags with their attributes, and which of them are open, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("meta", "rect", "line", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass


def test_the_page_opens_with_verdict_figures_and_heat_map_and_folds_the_rest() -> None:
    report = full_report()
    html = render_html(report_page(report))
    assert html.startswith("<!doctype html>")
    opening, rest = html[html.index("<header>") :].split("</header>")
    order = ["<h1>", '<p class="verdict', "SHIP: faster", 'class="ssp-panels"', "<figcaption>", 'class="ssp-mask"']
    places = [opening.index(sign) for sign in order]
    assert places == sorted(places)
    assert "<details" not in opening and "ssp-mask" not in re.sub(r"<style>.*?</style>", "", rest, flags=re.DOTALL)
    outline = Outline(html)
    headings = [(attrs["id"], parents) for tag, attrs, parents in outline.found if tag == "h2"]
    assert [key for key, _ in headings] == [block.key for block in report_page(report).blocks]
    assert all(parents[-2:] == ("details", "summary") for _, parents in headings)
    tables = [parents for tag, _, parents in outline.found if tag == "table"]
    assert tables and all("details" in parents for parents in tables)
    assert all(block.hint and f"<span>{block.hint}</span></summary>" in html for block in report_page(report).blocks)
    assert "script" not in Markup(html).tags


def test_paper_shows_what_is_folded() -> None:
    style = render_html(report_page(full_report()))
    printed = style[style.index("@media print") :]
    assert "details::details-content{content-visibility:visible" in printed


def test_a_summary_says_how_many_losses_are_behind_it() -> None:
    findings = report_page(build()).blocks[0]
    assert findings.key == "findings" and findings.sentences[0].startswith("LOSS: on held-out prompts")
    assert findings.hint == f"{len(findings.sentences)} sentences, 1 of them a loss or a warning"


def filled(drawing: ElementTree.Element) -> list[tuple[str | None, str | None]]:
    return [(r.get("x"), r.get("width")) for r in drawing.iter(f"{SVG}rect") if r.get("class") == "bar"]


def test_the_drawing_has_the_places_of_the_values_and_tells_them_to_those_who_do_not_see_it() -> None:
    report = build(latency=timed(FASTER, SLOWER))
    panels = panels_of(report)
    root = ElementTree.fromstring(render_panels(panels))
    assert root.get("role") == "img" and root.get("aria-label") == " ".join(map(spoken, panels))
    assert "KV cache per token 50 % (1.00 KiB of 2.00 KiB)" in (root.get("aria-label") or "")
    left, speed, lost = root.findall(f"{SVG}svg")
    assert filled(left) == [("0.00%", "87.50%"), ("0.00%", "50.00%")]
    assert filled(speed) == [("50.00%", "31.55%"), ("18.45%", "31.55%")]
    assert filled(lost) == [("0.00%", "50.00%")]
    reaches = [(line.get("x1"), line.get("x2")) for line in lost.iter(f"{SVG}line") if line.get("y1") == line.get("y2")]
    assert reaches == [("40.00%", "60.00%")]
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"What is left", "87.5 %", "LOSS: slower", "4 % to 6 %", "as fast", "not measured"} <= set(words)


def test_unmeasured_speed_is_a_quiet_line_of_the_drawing() -> None:
    _, speed, _ = ElementTree.fromstring(render_panels(panels_of(build()))).findall(f"{SVG}svg")
    assert [text.text for text in speed.iter(f"{SVG}text")] == ["Speed", "not measured yet: sspcompile bench"]
    assert not list(speed.iter(f"{SVG}rect"))


def test_names_and_loads_are_text_in_the_drawing() -> None:
    strange = row("time to first token", Estimate(2.0), EVIL, contender=EVIL, load=EVIL)
    html = render_html(report_page(build(latency=timed(strange))))
    assert "script" not in Markup(html).tags and "&lt;script&gt;" in html
    assert "\x1b" not in html and "\u202e" not in html
    ElementTree.fromstring(render_panels(panels_of(build(latency=timed(strange)))))


def test_a_page_without_a_judged_build_has_no_first_screen_and_nothing_folded(tmp_path: Path) -> None:
    bare = build(quality=())
    page = report_page(bare)
    assert page.first is None
    assert page.blocks[0].sentences[0].startswith("Quality was not measured")
    assert "details" not in Markup(render_html(page)).tags
    write_report(bare, tmp_path)
    assert (tmp_path / "mask.svg").read_text() == render_svg(mask())
    compared = render_html(comparison_page(points_of("two", {"a": build(), "b": bare})))
    assert "details" not in Markup(compared).tags


def test_markdown_opens_with_the_same_figures() -> None:
    lines = render_markdown(report_page(build())).splitlines()
    assert lines[2] == "**QUALITY HOLDS, speed is not known: run \\`sspcompile bench\\`.**"
    assert "| What is left (of the dense model, exact counts) | weights | 87.5 % | 3.50 MiB of 4.00 MiB |" in lines
    assert "| Speed |  | not measured yet: sspcompile bench |  |" in lines
    assert "|  | off the scenario | not measured |  |" in lines
    assert lines.index("![6 of 12 query heads are kept; a row is a layer, a column a head](mask.svg)") < lines.index(
        "## Findings"
    )


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(8, 8, 4), (30, 9, 3), (48, 40, 8), (80, 64, 8)])
def test_a_heat_map_is_not_taller_than_a_screen_and_its_legend_stays_inside(layers, heads, kv_heads) -> None:
    root = ElementTree.fromstring(render_svg(mask(layers, heads, kv_heads)))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert height <= max(490, 10 * layers + 110)
    if heads < 10:
        assert width <= 340, "the width of a phone"
    for text in root.iter(f"{SVG}text"):
        if text.get("text-anchor") is None:
            assert float(text.get("x", 0)) + 7 * len(text.text or "") <= width + 8, text.text
        assert float(text.get("y", 0)) < height


# --- The terminal ----------------------------------------------------------------------------------------------------


def shown(report: Report, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    console = Console(file=stream, width=80, force_terminal=False, no_color=True)
    render_text(report_page(report), console, only=())
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_a_terminal_of_80_columns_opens_with_the_same_screen() -> None:
    near = row("time to first token", Estimate(1.0, 0.843, 1.19), "no measurable change")
    assert [line.rstrip() for line in shown(build(latency=timed(near, SLOWER))).splitlines()] == [
        "desk",
        "",
        "NO MEASURABLE GAIN IN SPEED; weights -12.5 %, KV cache -50 %.",
        "",
        "What is left: of the dense model, exact counts",
        "  weights             ██████████░░ 87.5 % (3.50 MiB of 4.00 MiB)",
        "  KV cache per token  ██████░░░░░░ 50 % (1.00 KiB of 2.00 KiB)",
        "Speed: sliced as a multiple of dense, 99 % intervals, batch 1, 64+16 tokens",
        "  time to first token ░░░░░━●░░░░░ 1.00 (0.843 to 1.19), no measurable change",
        "  inter-token latency ━━●━━░│░░░░░ 0.500 (0.400 to 0.800), LOSS: slower",
        "What was lost: share of next tokens that change, held-out texts, 95 % intervals",
        "  on the scenario     ░░░░━━●━░░░░ 5 % (4 % to 6 %)",
        "  off the scenario                 not measured",
    ]
    assert "Speed: not measured yet: sspcompile bench\n" in shown(build())


def test_a_terminal_without_unicode_gets_the_same_screen_in_ascii() -> None:
    told = shown(build(latency=timed(FASTER)), "ascii")
    assert "weights             ##########--" in told
    assert "on the scenario" in told and "o" in told
    assert told.isascii()


def test_what_build_prints_begins_with_it(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_report(build(), only=SUMMARY)
    printed = capsys.readouterr().out
    assert printed.startswith(shown(build()))
    assert [line for line in printed.splitlines() if line in ("Findings", "Quality", "Size")] == ["Findings", "Quality"]
    assert max(map(len, printed.splitlines())) <= 80
