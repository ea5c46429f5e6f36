"""The report: harmless text, deterministic bytes, verdicts that follow the numbers."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from sspcompile.bench.capacity import Capacity
from sspcompile.bench.latency import BenchResult, ContenderResult, LoadResult
from sspcompile.bench.load import Load, Settings
from sspcompile.bench.ratios import compare_all
from sspcompile.bench.roofline import predict, roofline
from sspcompile.errors import ArtifactError
from sspcompile.intervals import Estimate, summarize
from sspcompile.model.divergence import Divergence
from sspcompile.report import Report, write_report
from sspcompile.report.build import latency_section, quality_row
from sspcompile.report.comparison import comparison_page, frontier_page, points_of, render_points
from sspcompile.report.format import change, clean, figures, percent, seconds, size
from sspcompile.report.html import render_html
from sspcompile.report.json import read_report, render_json
from sspcompile.report.markdown import render_markdown
from sspcompile.report.model import (
    BudgetSection,
    LayoutSection,
    MaskSection,
    Pair,
    ParitySection,
    QualityRow,
    RepairSection,
    RuntimeRow,
    ScenarioSection,
    SizesSection,
)
from sspcompile.report.page import report_page
from sspcompile.report.schema import SCHEMAS, schema_text
from sspcompile.report.svg import render_svg
from sspcompile.report.text import render_text
from sspcompile.report.verdict import alarming, headline, verdict

EVIL = "<script>alert(1)</script> \x1b[31mred\x07 [bold]x[/bold] | a\n# head ![i](http://x.y/z.png) \u202eabc &amp;"


def quality(name: str, kl: float, role="other", *, agreement: float = 0.95, above: Estimate | None = None):
    mean = Estimate(value=kl, low=kl * 0.9, high=kl * 1.1)
    agree = Estimate(value=agreement, low=agreement - 0.01, high=min(1, agreement + 0.01))
    return QualityRow(name=name, role=role, mean_kl=mean, top1_agreement=agree, kl_above_ours=above)


def mask(layers: int = 3, heads: int = 4, kv_heads: int = 2) -> MaskSection:
    return MaskSection(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        kept=tuple(tuple(h for h in range(heads) if (h + layer) % 2 == 0) for layer in range(layers)),
        scores=tuple(tuple(float(h * layer) for h in range(heads)) for layer in range(layers)),
        whitelist=tuple(tuple(h == 0 and layer == 0 for h in range(heads)) for layer in range(layers)),
        criterion="fisher",
    )


def narrowed(layers: int = 3, heads: int = 4, kv_heads: int = 2) -> MaskSection:
    """As `mask`, with MLPs of which a quarter, a half, ... is left."""
    widths = tuple(16 * (1 + layer % 4) for layer in range(layers))
    return mask(layers, heads, kv_heads).model_copy(update={"widths": widths, "intermediate": 64})


def full_report(text: str = "Answer bakers.") -> Report:
    ours = quality("ours", 0.1, "ours")
    return Report(
        title=text,
        model=text,
        scenario=ScenarioSection(
            name="bakery", source="prompts", text=text, prompts=(text, text), mixture={text: 0.9, "b": 0.1}
        ),
        mask=mask(),
        budget=BudgetSection(keep_requested=0.5, keep_achieved=0.48),
        layout=LayoutSection(requested="auto", chosen="per-layer", figures=(quality("uniform", 0.3, "uniform"),)),
        parity=ParitySection(max_difference=1e-6, logit_scale=10, tolerance=1e-5, texts_equal=True),
        repair=RepairSection(used=True, kl_before=0.2, kl_after=0.1),
        quality=(ours, quality("random", 0.5, "random")),
        sizes=sizes(),
        runtimes=(RuntimeRow(name="transformers", loads=True), RuntimeRow(name="vLLM", loads=False, note=text)),
        latency=latency_section(bench_result()),
        notes=(text,),
        versions={"torch": "2"},
        command="sspcompile build --scenario x",
    )


def sizes(parameters: Pair | None = None) -> SizesSection:
    return SizesSection(
        parameters=parameters or Pair(dense=1000, sliced=875),
        weight_bytes=Pair(dense=4_194_304, sliced=3_670_016),
        kv_bytes_per_token=Pair(dense=2048, sliced=1024),
        prunable_share=0.25,
    )


def bench_result(prefill: float = 0.5, decode: float = 1.0) -> BenchResult:
    """Synthetic samples: sliced prefill and decode are the given multiples of the dense ones."""
    noise = [1.0, 1.02, 0.99, 1.01, 0.98, 1.03, 0.97, 1.0]

    # An unpaired wobble, so that equal speeds are equal only within their noise.
    def under(p: float, d: float, wobble: list[float]) -> LoadResult:
        timed = {
            "prefill_seconds": summarize([p * x for x in noise]),
            "inter_token_seconds": summarize([d * x for x in wobble]),
        }
        return LoadResult(LOAD, timed, {}, roofline(4e6 * p, 1e6, 4e9, d))

    def contender(name: str, p: float, d: float, wobble: list[float]) -> ContenderResult:
        once = {"peak_resident_bytes": summarize([4e8 * p]), "weight_bytes": summarize([4e6])}
        return ContenderResult(name, name, "hf", "A", "float32", once, (under(p, d, wobble),))

    dense = contender("dense", 0.1, 0.01, noise)
    sliced = contender("sliced", 0.1 * prefill, 0.01 * decode, noise[::-1])
    names = ("dense", "sliced")
    tops, bottoms = dense.loads[0].metrics, sliced.loads[0].metrics
    ratios = (
        *compare_all(tops, bottoms, sessions=4, names=names, load=LOAD.label),
        *compare_all(dense.metrics, sliced.metrics, sessions=1, names=names),
    )
    decoding = next(ratio for ratio in ratios if ratio.metric == "inter_token_seconds")
    predicted = predict(dense.loads[0].roofline, sliced.loads[0].roofline, decoding)
    return BenchResult(
        Settings((LOAD,), 4, 2, 1, 1, 0, "cpu", 10**9),
        (dense, sliced),
        ratios,
        (predicted,),
        (Capacity("dense", 10**9, 80, 512, 99), Capacity("sliced", 10**9, 80, 512, 199)),
        summarize([4e9]),
        {"torch": "2"},
    )


LOAD = Load(1, 64, 16)


class Markup(HTMLParser):
    """Collects tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def text_of(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    render_text(report_page(report), Console(file=stream, width=width, force_terminal=False, no_color=True))
    return stream.getvalue()


def test_html_escapes_prompts_and_fetches_nothing() -> None:
    html = render_html(report_page(full_report(EVIL)))
    page = Markup(html)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in html
    assert "img" not in page.tags and "link" not in page.tags
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "\x1b" not in html and "\u202e" not in html


def test_html_is_accessible_and_knows_light_and_dark() -> None:
    html = render_html(report_page(full_report()))
    page = Markup(html)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme:dark" in html
    assert page.tags.count("caption") == page.tags.count("table") > 5
    assert ("scope", "col") in page.attributes and ("scope", "row") in page.attributes
    assert ("lang", "en") in page.attributes
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_no_output_carries_terminal_control_sequences() -> None:
    report = full_report(EVIL)
    page = report_page(report)
    for output in (text_of(report), render_markdown(page), render_html(page), render_json(report)):
        assert "\x1b" not in output and "\x07" not in output and "\u202e" not in output
    assert "[bold]" in text_of(report, 400), "brackets of a prompt are text, not markup"


def test_markdown_keeps_prompts_out_of_its_structure() -> None:
    markdown = render_markdown(report_page(full_report(EVIL)))
    assert "<script>" not in markdown
    assert "\n# head" not in markdown
    assert "![i](" not in markdown
    for line in markdown.splitlines():
        if line.startswith("| vLLM"):
            assert line.replace("\\|", "").count("|") == 4


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_text_gives_well_formed_output(text: str) -> None:
    report = full_report("x" + text.encode("utf-8", "replace").decode())
    Markup(render_html(report_page(report)))
    json.loads(render_json(report))
    assert all(c.isprintable() or c in " \u200c\u200d" for c in clean(text))
    text_of(report)
    render_markdown(report_page(report))


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(8, 8, 4), (48, 40, 8), (2, 4, 4), (3, 6, 1), (1, 1, 1)])
def test_svg_is_well_formed_and_shows_every_cell(layers: int, heads: int, kv_heads: int) -> None:
    section = mask(layers, heads, kv_heads)
    root = ElementTree.fromstring(render_svg(section))
    space = "{http://www.w3.org/2000/svg}"
    titles = [element.text or "" for element in root.iter(f"{space}title")]
    assert len(titles) == layers * heads
    assert sum(" kept," in title for title in titles) == sum(map(len, section.kept))
    assert titles[0] == "layer 0, head 0, key/value head 0: kept, score 0, whitelisted"
    crosses = [e for e in root.iter(f"{space}path") if e.get("class") == "x"]
    assert len(crosses) == layers * heads - sum(map(len, section.kept)) + 1, "one per removed head, one in the legend"
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in root.iter(f"{space}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height", 0)) <= height


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(8, 8, 4), (48, 40, 8), (3, 6, 1), (1, 1, 1)])
def test_the_heat_map_has_a_bar_for_what_is_left_of_every_mlp(layers: int, heads: int, kv_heads: int) -> None:
    section = narrowed(layers, heads, kv_heads)
    root = ElementTree.fromstring(render_svg(section))
    space = "{http://www.w3.org/2000/svg}"
    bars = [group for group in root.iter(f"{space}g") if "MLP" in str(group.findtext(f"{space}title"))]
    assert len(bars) == layers
    for layer, bar in enumerate(bars):
        outline, filled = bar.findall(f"{space}rect")
        share = float(filled.get("width", 0)) / float(outline.get("width", 0))
        assert share == pytest.approx(section.widths[layer] / 64)
    assert bars[0].findtext(f"{space}title") == "layer 0, MLP: 16 of 64 channels kept (25 %)"
    assert "of the channels of the MLPs kept, of 64 in each layer" in root.get("aria-label", "")
    assert "channels of the MLP kept" in [text.text for text in root.iter(f"{space}text")], "the legend says what it is"
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in root.iter(f"{space}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height", 0)) <= height
    assert heads >= 10 or width <= 340, "the width of a phone"


def narrowed_report(**budget: object) -> Report:
    known = {"unit": "parameters", "size_requested": 0.8, "size_achieved": 0.795, "keep_requested": 0.5}
    channels = sizes().model_copy(update={"channel_share": 0.6})
    section = BudgetSection(**{**known, "keep_achieved": 0.5, **budget})
    return full_report().model_copy(update={"mask": narrowed(), "budget": section, "sizes": channels})


def test_every_form_shows_the_widths_of_the_mlps() -> None:
    report = narrowed_report()
    for told in (text_of(report, width=200), render_markdown(report_page(report)), render_html(report_page(report))):
        assert "Heads and channels" in told
        assert "MLP width" in told and "MLP (of 64)" in told
        assert "6 of 12 query heads and 96 of 192 channels of the MLPs are kept" in told
        assert "79.5 % of the parameters are kept, 50 % of the heads" in told
        assert "no more could go" not in told
        assert "channels of its MLPs 60 %" in told


def test_a_bound_on_the_loss_is_told_in_the_unit_that_was_measured() -> None:
    walked = {"max_loss": 0.05, "measured": ((0.75, 0.2), (0.88, 0.04))}
    told = text_of(narrowed_report(**walked), width=300)
    assert "share of the parameters" in told and re.search(r"75 % \W+ 20 % .*\n.* 88 % \W+ 4 % ", told)
    heads = BudgetSection(keep_requested=0.8, keep_achieved=0.75, **walked)
    told = text_of(full_report().model_copy(update={"budget": heads}), width=300)
    assert "75 % of the heads are kept" in told and "share of the heads" in told


@pytest.mark.parametrize(("most", "shown"), [(0.092, False), (0.03, True)])
def test_a_bound_that_the_deciding_prompts_are_too_few_to_show_is_told(most: float, shown: bool) -> None:
    walked = {"max_loss": 0.05, "measured": ((0.75, 0.2), (0.88, 0.0)), "at_most": (0.3, most)}
    told = text_of(narrowed_report(**walked), width=300)
    assert ("have too few tokens to show 5 %: even a model" in told) == (not shown)
    assert ("no less than 9.2 %" in told) == (not shown)


def test_numbers_that_were_allowed_are_told_with_what_they_were_counted_for() -> None:
    memory = {"memory_requested": 6 << 30, "memory_achieved": 5 << 30, "context": 8192, "batch": 4}
    told = text_of(narrowed_report(params_requested=1_200_000), width=300)
    assert "At most 80 % of the parameters, no more than 1,200,000, were allowed; 79.5 % of the parameters" in told
    told = text_of(narrowed_report(unit="memory", size_requested=None, **memory), width=300)
    assert "At most 6.00 GiB of memory (weights and the KV cache of 4 sequences of 8,192 tokens) were allowed" in told
    assert "5.00 GiB are taken, 79.5 % of the parameters are kept, 50 % of the heads" in told


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"unit": "parameters", "size_requested": 0.8}, "a larger --size"),
        ({"unit": "parameters", "size_requested": 0.8, "params_requested": 9}, "a larger --max-params"),
        ({"unit": "memory", "memory_requested": 9}, "a larger --max-memory"),
        ({"max_loss": 0.3}, "a smaller --max-loss"),
        ({"strength": 0.5}, "a smaller --strength"),
        ({}, "a larger --keep"),
    ],
)
def test_the_hint_names_the_option_that_was_the_budget(budget: dict[str, object], expected: str) -> None:
    section = BudgetSection(keep_requested=0.5, keep_achieved=0.5, **budget)
    lossy = (quality("ours", 1.0, "ours", agreement=0.5),)
    assert f"try {expected} before" in " ".join(verdict(Report(title="x", budget=section, quality=lossy)))


def test_a_report_from_before_channels_is_read(tmp_path: Path) -> None:
    value = json.loads(render_json(full_report()))
    for section, later in (
        ("mask", ("widths", "intermediate")),
        ("budget", ("unit", "size_requested", "size_achieved")),
        ("sizes", ("channel_share",)),
    ):
        for name in later:
            del value[section][name]
    (tmp_path / "report.json").write_text(json.dumps(value))
    read = read_report(tmp_path / "report.json")
    assert read == full_report()
    assert "Kept query heads per layer" in render_markdown(report_page(read))


@pytest.mark.parametrize("change", [{"widths": (1, 2)}, {"intermediate": None}, {"widths": (1, 2, 65)}])
def test_widths_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="width"):
        MaskSection.model_validate(narrowed().model_dump() | change)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        contents.append([path.read_bytes() for path in write_report(full_report(), folder)])
    assert contents[0] == contents[1]
    assert sorted(p.name for p in folder.iterdir()) == ["mask.svg", "report.html", "report.json", "report.md"]


def test_json_reads_back_to_the_same_report(tmp_path: Path) -> None:
    report = full_report(EVIL)
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == list(verdict(report))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"title": "x", "schema_version": 9}', '{"title": 1}'])
def test_a_broken_report_file_is_an_artifact_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(ArtifactError, match="There is no report"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ArtifactError, match="is not a report of this version"):
        read_report(tmp_path / "report.json")


def test_every_section_may_be_absent(tmp_path: Path) -> None:
    report = Report(title="bare")
    write_report(report, tmp_path)
    assert "Quality was not measured" in text_of(report)
    assert not (tmp_path / "mask.svg").exists()


def test_nan_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        QualityRow(name="x", role="other", mean_kl=Estimate(float("nan")), top1_agreement=Estimate(1.0))
    with pytest.raises(ValidationError, match="kept does not fit"):
        MaskSection(layers=1, heads=2, kv_heads=1, kept=((2,),), criterion="x")
    with pytest.raises(ValidationError, match="scores is not"):
        MaskSection(layers=1, heads=2, kv_heads=1, kept=((0,),), scores=((1.0,),), criterion="x")


# ---- verdicts -----------------------------------------------------------------------------------------------


def verdict_of(**sections: object) -> str:
    return " ".join(verdict(Report(title="x", **sections)))


def test_a_loss_is_never_hidden() -> None:
    text = verdict_of(quality=(quality("ours", 0.1, "ours", agreement=0.95),))
    assert "LOSS" in text and "5 % of the positions (4 % to 6 %)" in text
    assert "different model" not in text
    assert "different model" in verdict_of(quality=(quality("ours", 1.0, "ours", agreement=0.5),))
    exact = QualityRow(name="o", role="ours", mean_kl=Estimate(value=0), top1_agreement=Estimate(value=1))
    assert "no difference from the dense model" in verdict_of(quality=(exact,))
    assert "under 0.1 %" in verdict_of(quality=(quality("ours", 0.1, "ours", agreement=0.9999),))


def test_right_answers_are_compared_with_the_dense_models() -> None:
    def with_answers(name: str, role, share: float) -> QualityRow:
        return quality(name, 0.1, role).model_copy(update={"exact_match": Estimate(value=share)})

    rows = (with_answers("dense", "dense", 0.9), with_answers("ours", "ours", 0.8))
    assert "LOSS: 80 % of the answers are right, the dense model's are 90 %." in verdict_of(quality=rows)
    assert "right answers" in text_of(Report(title="x", quality=rows), 200)
    assert "right answers" not in text_of(full_report(), 200)


@pytest.mark.parametrize(
    ("kl", "above", "expected"),
    [
        (0.5, None, "ours is closer"),
        (0.1, None, "no measurable difference"),
        (0.01, None, "ours is FURTHER"),
        (0.1, Estimate(value=0.1, low=0.05, high=0.2), "ours is closer"),
        (0.5, Estimate(value=0.1, low=-0.05, high=0.2), "no measurable difference"),
        (0.5, Estimate(value=-0.1, low=-0.2, high=-0.05), "ours is FURTHER"),
    ],
)
def test_baselines_are_judged_by_intervals(kl: float, above: Estimate | None, expected: str) -> None:
    rows = (quality("ours", 0.1, "ours"), quality("random heads", kl, "random", above=above))
    assert f"Against random heads at the same budget: {expected}" in verdict_of(quality=rows)


def test_without_intervals_nothing_is_claimed() -> None:
    bare = Estimate(value=0.5)
    rows = (quality("ours", 0.1, "ours"), QualityRow(name="r", role="random", mean_kl=bare, top1_agreement=bare))
    assert "too few prompts to tell" in verdict_of(quality=rows)


@pytest.mark.parametrize(
    ("parity", "expected"),
    [
        (ParitySection(max_difference=1e-5, logit_scale=10, tolerance=1e-5, texts_equal=True), "The files equal"),
        (
            ParitySection(max_difference=2e-13, logit_scale=10, tolerance=1e-9, dtype="float64"),
            "largest logit difference 2.00e-14 of the scale in float64",
        ),
        (ParitySection(max_difference=1e-2, logit_scale=10, tolerance=1e-5), "FAILED: the files do not equal"),
        (
            ParitySection(max_difference=0, logit_scale=10, tolerance=1e-5, texts_equal=False),
            "FAILED: the files write other text",
        ),
    ],
)
def test_parity_verdicts(parity: ParitySection, expected: str) -> None:
    assert expected in verdict_of(parity=parity)


def test_speed_verdicts_say_faster_slower_or_nothing() -> None:
    text = verdict_of(latency=latency_section(bench_result(prefill=0.5, decode=1.0)))
    assert "time to first token (batch 1, 64+16 tokens): 2.00" in text and "times faster" in text
    assert "inter-token latency (batch 1, 64+16 tokens): no measurable change" in text
    assert "peak resident memory: too few samples" in text
    slower = verdict_of(latency=latency_section(bench_result(prefill=1.0, decode=2.0)))
    assert "inter-token latency (batch 1, 64+16 tokens): LOSS: 2.0" in slower


def test_size_repair_and_unknown_verdicts() -> None:
    assert "Parameters -12.5 %, KV cache per token -50 %" in verdict_of(sizes=sizes())
    assert "Nothing was cut" in verdict_of(sizes=sizes(Pair(dense=10, sliced=10)))
    assert "not used (made it worse)" in verdict_of(repair=RepairSection(used=False, reason="made it worse"))
    scenario = ScenarioSection(name="x", source="sentence", unknown=0.8)
    assert "fits no known domain" not in verdict_of(scenario=scenario)
    told = scenario.model_copy(update={"fits_no_domain": True})
    assert "80 % of the scenario fits no known domain" in verdict_of(scenario=told)


def test_measured_values_become_rows() -> None:
    measured = Divergence(Estimate(0.2, 0.1, 0.3), Estimate(0.9), (0,), (0.2,), (0.9,), (4,))
    row = quality_row("ours", measured, role="ours", above_ours=Estimate(0.0, -1, 1))
    assert row.mean_kl == Estimate(value=0.2, low=0.1, high=0.3)
    assert row.top1_agreement == Estimate(value=0.9)
    assert row.kl_above_ours == Estimate(value=0.0, low=-1, high=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures(0.1), "0.100"),
        (figures(1234.5), "1,234"),
        (figures(0.99999), "1.00"),
        (figures(1e-9), "1.00e-09"),
        (percent(0.99999), "just under 100 %"),
        (percent(1e-9), "under 0.1 %"),
        (percent(0.125), "12.5 %"),
        (size(1536), "1.50 KiB"),
        (size(12), "12 bytes"),
        (seconds(0.00123), "1.23 ms"),
        (change(0, 0), "no change"),
        (change(4, 5), "+25 %"),
    ],
)
def test_numbers_as_words(text: str, expected: str) -> None:
    assert text == expected


def test_one_conclusion_follows_from_the_numbers() -> None:
    def concluded(**sections: object) -> str:
        return headline(Report(title="x", **sections)) or ""

    ours = quality("ours", 0.1, "ours")
    assert headline(Report(title="x")) is None
    assert concluded(quality=(ours,)).startswith("QUALITY HOLDS, speed is not known")
    broken = ParitySection(max_difference=1.0, logit_scale=1, tolerance=1e-5)
    assert concluded(quality=(ours,), parity=broken).startswith("DO NOT SHIP: the files")
    changed = quality("ours", 1.0, "ours", agreement=0.5)
    assert concluded(quality=(changed,)).startswith("DO NOT SHIP: 50 %")
    for times, word in ((1.05, "TEST BEFORE YOU SHIP: 50 %"), (1.06, "DO NOT SHIP: 50 %")):
        answering = changed.model_copy(update={"answer_perplexity": Estimate(value=times, low=0.9, high=1.1)})
        assert concluded(quality=(answering,)).startswith(word)
        assert ("a different model in use" in verdict_of(quality=(answering,))) == (times > 1.05)
    few = changed.model_copy(update={"answer_perplexity": Estimate(value=1.0)})
    assert concluded(quality=(few,)).startswith("DO NOT SHIP: 50 %"), "two answers without an interval say nothing"
    off = {"off_kl": Estimate(value=5.0, low=4.0, high=6.0), "off_agreement": Estimate(value=0.3)}
    elsewhere = few.model_copy(update={"answer_perplexity": Estimate(value=1.0, low=0.9, high=1.1), **off})
    assert "it loses quality off domain, where 70 % of the next tokens differ" in concluded(quality=(elsewhere,))
    off = {"off_kl": Estimate(value=0.5, low=0.4, high=0.6), "off_agreement": Estimate(value=0.7)}
    narrow = concluded(quality=(ours.model_copy(update=off),))
    assert narrow == (
        "SHIP FOR THIS SCENARIO ONLY: loses quality off domain, where 30 % of the next tokens differ, against 5 % on "
        "its own."
    )
    near = {"off_kl": Estimate(value=0.11, low=0.1, high=0.2), "off_agreement": Estimate(value=0.9)}
    assert "SCENARIO ONLY" not in concluded(quality=(ours.model_copy(update=near),))
    faster = latency_section(bench_result(prefill=0.5, decode=1.0))
    assert concluded(quality=(ours,), latency=faster, sizes=sizes()) == (
        "SHIP: faster where it was measured (time to first token); weights -12.5 %, KV cache -50 %."
    )
    slower = faster.model_copy(update={"rows": (*faster.rows, faster.rows[0].model_copy(update={"verdict": "worse"}))})
    assert "(time to first token in 1 of 2 measurements)." in concluded(quality=(ours,), latency=slower)
    same = latency_section(bench_result(prefill=1.0, decode=1.0))
    assert concluded(quality=(ours,), latency=same, sizes=sizes()) == (
        "NO MEASURABLE GAIN IN SPEED; weights -12.5 %, KV cache -50 %."
    )
    both = concluded(quality=(ours.model_copy(update=off),), latency=same)
    assert both.startswith("NO MEASURABLE GAIN IN SPEED; loses quality off domain, where 30 % of the next tokens")


@pytest.mark.parametrize("agreement", [0.92, 0.5])
@pytest.mark.parametrize("speed", [None, 0.5, 1.0])
def test_no_conclusion_praises_a_build_that_measurably_loses_more_than_was_allowed(agreement, speed) -> None:
    ours = quality("ours", 0.1, "ours", agreement=agreement)
    latency = None if speed is None else latency_section(bench_result(prefill=speed, decode=speed))

    def told(max_loss: float | None, row: QualityRow = ours) -> str:
        budget = BudgetSection(keep_requested=1, keep_achieved=1, max_loss=max_loss)
        return headline(Report(title="x", quality=(row,), budget=budget, latency=latency)) or ""

    if agreement < 0.9:
        assert told(0.02).startswith("DO NOT SHIP")
        answering = ours.model_copy(update={"answer_perplexity": Estimate(value=1.0, low=0.95, high=1.05)})
        assert "about as likely as before" in told(0.02, answering)
        assert "it loses more than --max-loss allows. Ask" in told(0.02, answering)
        return
    assert alarming(told(0.02)) and told(0.02) == (
        "LOSES MORE THAN --max-loss ALLOWS: 8 % (7 % to 9 %) of the next tokens on the scenario's own domain differ "
        "from the dense model's, of 2 % allowed. Try a smaller --max-loss."
    )
    off = {"off_kl": Estimate(value=0.5, low=0.4, high=0.6), "off_agreement": Estimate(value=0.7)}
    assert "allowed; it also loses quality off domain, where 30 %" in told(0.02, ours.model_copy(update=off))
    for chance in (0.075, 0.08, None):
        assert "--max-loss" not in told(chance), "by no more than chance may do"


def test_answers_hold_by_an_interval_that_says_so_and_not_by_a_figure_alone() -> None:
    changed = quality("ours", 1.0, "ours", agreement=0.5)

    def told(value: float, low: float | None, high: float | None) -> str:
        row = changed.model_copy(update={"answer_perplexity": Estimate(value=value, low=low, high=high)})
        return headline(Report(title="x", quality=(row,))) or ""

    assert told(1.04, 0.99, 1.09).startswith("TEST BEFORE YOU SHIP")
    for vague in ((1.04, 0.6, 2.1), (0.9, 0.6, 1.2), (1.0, None, None)):
        assert told(*vague).startswith("DO NOT SHIP")


@pytest.mark.parametrize("agreement", [0.95, 0.85])
@pytest.mark.parametrize(
    ("replies", "exceeded", "broken"), [(1.04, False, False), (1.06, True, False), (1.2, True, True)]
)
def test_a_bound_on_the_perplexity_of_replies_is_told_whether_it_holds(agreement, replies, exceeded, broken) -> None:
    ours = quality("ours", 0.1, "ours", agreement=agreement)
    ours = ours.model_copy(
        update={"reply_perplexity": Estimate(value=replies, low=replies - 0.05, high=replies + 0.05)}
    )
    budget = BudgetSection(keep_requested=1, keep_achieved=1, max_perplexity=1.05)
    report = Report(title="x", quality=(ours,), budget=budget)
    first, told = headline(report) or "", [one for one in verdict(report) if "eld-out replies have" in one][-1]
    assert (
        told.startswith("LOSS: held-out replies have" if exceeded else "Held-out replies have")
        and "of 1.05 times allowed" in told
    )
    assert ("by no more than chance may do" in told) is (exceeded and not broken)
    if agreement < 0.9:
        assert first.startswith("DO NOT SHIP" if exceeded else "TEST BEFORE YOU SHIP: 15 % of the next tokens")
        assert ("of 1.05 that --max-perplexity allows" in first) is not exceeded
    else:
        assert first.startswith("LOSES MORE THAN --max-perplexity ALLOWS") is broken
        assert broken or first.startswith("QUALITY HOLDS")
    assert not broken or "a smaller --max-perplexity" in " ".join(verdict(report)) or agreement >= 0.9


@pytest.mark.parametrize(
    ("most", "replies"),
    [(20, (8.0, 7.0, 9.0)), (1.05, (1.04, None, None)), (1.05, (1.04, 0.9, 1.9)), (1.2, (1.1, 1, 1.3))],
)
def test_a_loose_bound_on_replies_or_a_wide_interval_is_no_reason_to_ship_another_model(most, replies) -> None:
    value, low, high = replies
    given = {"reply_perplexity": Estimate(value=value, low=low, high=high)}
    ours = quality("ours", 0.1, "ours", agreement=0.6).model_copy(update=given)
    budget = BudgetSection(keep_requested=1, keep_achieved=1, max_perplexity=most)
    told = verdict(Report(title="x", quality=(ours,), budget=budget))
    assert told[0].startswith("DO NOT SHIP") and "a different model in use" in " ".join(told)


def test_every_broken_bound_is_named_and_close_figures_are_told_apart() -> None:
    ours = quality("ours", 0.1, "ours", agreement=0.92)
    ours = ours.model_copy(update={"reply_perplexity": Estimate(value=1.0149, low=1.0112, high=1.0188)})
    budget = BudgetSection(keep_requested=1, keep_achieved=1, max_loss=0.02, max_perplexity=1.01)
    told = headline(Report(title="x", quality=(ours,), budget=budget)) or ""
    assert told.startswith("LOSES MORE THAN --max-loss and --max-perplexity ALLOWS: 8 %")
    assert "1.015 (1.011 to 1.019) times" in told and "of 1.01 times allowed" in told
    worse = ours.model_copy(update={"top1_agreement": Estimate(value=0.8, low=0.7, high=0.85)})
    told = headline(Report(title="x", quality=(worse,), budget=budget)) or ""
    assert told.startswith("DO NOT SHIP") and "it loses more than --max-loss and --max-perplexity allows" in told


@pytest.mark.parametrize("there", [0.96, 0.95, 0.9499, 0.94, 0.7, 1.0])
def test_a_loss_off_domain_is_told_only_where_the_figures_beside_it_say_so(there) -> None:
    ours = quality("ours", 0.1, "ours", agreement=0.95)
    off = {"off_kl": Estimate(value=0.5, low=0.4, high=0.6), "off_agreement": Estimate(value=there)}
    told = headline(Report(title="x", quality=(ours.model_copy(update=off),))) or ""
    assert ("off domain" in told) == (there in (0.94, 0.7))


def test_what_the_bytes_predict_is_told_with_the_reason_why_it_is_not_more() -> None:
    report = full_report()
    assert report.latency is not None
    prediction = report.latency.predictions[0]

    def told(**change: object) -> str:
        latency = report.latency.model_copy(update={"predictions": (prediction.model_copy(update=change),)})
        return verdict_of(latency=latency)

    near = Estimate(value=1.2, low=1.1, high=1.3)
    assert "which agrees" in told(predicted=1.25, measured=near)
    assert "cannot tell that from no change" in told(predicted=1.25, measured=Estimate(value=1.1, low=0.9, high=1.3))
    assert "more than reading saves" in told(predicted=1.05, measured=near)
    assert "the other 90 % do not shrink" in told(predicted=2.0, measured=near, reference_share=0.1)
    assert "does not turn the saved bytes into time" in told(predicted=2.0, measured=near, reference_share=0.9)
    assert "too few processes" in told(predicted=2.0, measured=Estimate(value=1.2))


def test_builds_side_by_side_tell_shares_of_the_parameters_beside_heads() -> None:
    points = points_of("two", {"heads": full_report("heads"), "channels": narrowed_report()})
    first, second = points.points
    assert (first.unit, first.kept, second.unit, second.kept) == ("heads", 0.48, "parameters", 0.875)
    assert second.size_requested == 0.8 and first.size_requested is None
    for page in (comparison_page(points), frontier_page(points)):
        assert "parameters kept" in render_markdown(page)
    picture = frontier_page(points).blocks[0].picture
    assert picture is not None and picture.label.endswith("kept shares of the heads or parameters")
    assert "0.88" in picture.svg and "0.48" in picture.svg, "each in the unit of its budget"


def test_builds_side_by_side_mark_those_that_nothing_beats() -> None:
    big, small, worse = full_report("big"), full_report("small"), full_report("worse")
    fewer = sizes().model_copy(update={"weight_bytes": Pair(dense=4_194_304, sliced=2_000_000)})
    small = small.model_copy(update={"sizes": fewer, "quality": (quality("ours", 0.5, "ours"),)})
    worse = worse.model_copy(update={"quality": (quality("ours", 0.3, "ours"),)})
    points = points_of("three", {"big": big, "small": small, "worse": worse})
    assert [point.frontier for point in points.points] == [True, True, False]
    assert any("different scenarios" in note for note in points.notes)
    assert json.loads(render_points(points))["points"][0]["decode"]["value"] == pytest.approx(1.0, abs=0.05)
    for page in (comparison_page(points), frontier_page(points)):
        assert "worse" in render_markdown(page)
        Markup(render_html(page))
    drawn = [frontier_page(points).blocks[0].picture for _ in range(2)]
    assert drawn[0] == drawn[1], "the same points give the same bytes"
    assert drawn[0] is not None
    ElementTree.fromstring(drawn[0].svg)


def test_points_of_unmeasured_builds_say_so() -> None:
    bare = full_report().model_copy(update={"latency": None})
    points = points_of("x", {"a": bare, "b": full_report()})
    assert points.points[0].decode is None
    assert any(note.startswith("Not measured for speed: a.") for note in points.notes)


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas_are_those_of_the_code(name: str) -> None:
    published = Path(__file__).parents[1] / "docs" / "schemas" / name
    assert published.read_text("utf-8") == schema_text(name), "run `make generated`"


def test_reports_and_samples_follow_their_schemas() -> None:
    import jsonschema

    for name, value in {
        "report.schema.json": json.loads(render_json(full_report(EVIL))),
        "bench.schema.json": bench_result().to_json(),
        "points.schema.json": json.loads(render_points(points_of("x", {"a": full_report()}))),
    }.items():
        jsonschema.validate(value, json.loads(schema_text(name)))


@pytest.mark.parametrize(
    ("judged", "told"),
    [
        ((0, 29), "none of them is"),
        ((1, 29), "one of them is"),
        ((4, 22), "4 of them are"),
        ((8, 8), None),
        (None, None),
    ],
)
@pytest.mark.parametrize("lost", [0.0, 0.1])
def test_the_verdict_says_whose_prompts_judged(judged, told, lost):
    scenario = ScenarioSection(name="bakery", source="prompts", judged=judged)
    ours = quality("ours", lost, "ours", agreement=1.0 - lost)
    found = [one for one in verdict(Report(title="x", scenario=scenario, quality=(ours,))) if "pools" in one]
    assert len(found) == (told is not None) and all(str(told) in one and f"{judged[1]} prompts" in one for one in found)
