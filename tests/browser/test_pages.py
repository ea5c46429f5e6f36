"""The pages in a real browser: quiet, still, readable in light, dark, on a phone and on paper, and accessible."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = os.environ.get("BROWSER_PAGES")
if FOLDER is None:
    pytest.skip("run through `make test-browser`, which writes the pages first", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

PAGES = ("report.html", "uniform.html", "comparison.html", "frontier.html")
QUIET = (
    "--disable-gpu",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-quic",
    "--disable-component-update",
    "--disable-sync",
)
SERIOUS = ("serious", "critical")
# What a screen of each kind is like, in CSS pixels.
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
REPORTS = ("report.html", "uniform.html")
UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser):
    """Open a page of the folder and collect what it says and asks for."""
    contexts = []

    def call(name: str, scheme: str = "light", size: dict[str, int] = DESK) -> tuple[Page, list[str], list[str]]:
        context = browser.new_context(color_scheme=scheme, viewport=size)
        contexts.append(context)
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((Path(str(FOLDER)) / name).absolute().as_uri())
        return page, said, asked

    yield call
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_small_quiet_and_asks_for_nothing(name, open_page):
    assert (Path(str(FOLDER)) / name).stat().st_size < 1 << 20
    page, said, asked = open_page(name)
    assert said == []
    assert asked == [page.url]
    assert page.locator("h1").count() == 1
    assert page.locator("script").count() == 0


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_serious_finding_of_axe(name, scheme, size, open_page):
    page, _, _ = open_page(name, scheme, size)
    for _ in ("folded", "unfolded"):
        found = Axe().run(page).response["violations"]
        told = [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in SERIOUS]
        assert told == []
        page.evaluate(UNFOLD)


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_tables_and_not_the_page(name, open_page):
    page, _, _ = open_page(name, size=PHONE)
    page.evaluate(UNFOLD)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("name", REPORTS)
def test_a_desk_shows_verdict_figures_and_heat_map_without_scrolling(name, open_page):
    page, _, _ = open_page(name)
    ends = [page.locator(part).bounding_box() for part in (".verdict", ".ssp-panels", ".ssp-mask")]
    bottoms = [box["y"] + box["height"] for box in ends]
    assert bottoms == sorted(bottoms) and bottoms[-1] <= DESK["height"]


@pytest.mark.parametrize("size", [DESK, {"width": 961, "height": 700}, PHONE], ids=["desk", "narrow", "phone"])
@pytest.mark.parametrize("name", REPORTS)
def test_the_words_of_the_figures_do_not_run_into_each_other(name, size, open_page):
    page, _, _ = open_page(name, size=size)
    boxes = [(one.text_content(), one.bounding_box()) for one in page.locator(".ssp-panels text").all()]
    assert len(boxes) > 15
    for index, (text, a) in enumerate(boxes):
        assert a["x"] >= 0 and a["x"] + a["width"] <= size["width"], text
        for other, b in boxes[:index]:
            apart = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert apart or abs(a["y"] - b["y"]) >= 10, (text, other)


@pytest.mark.parametrize("name", REPORTS)
def test_details_open_by_key_and_all_of_them_on_paper(name, open_page):
    page, _, _ = open_page(name)
    shown = "[...document.querySelectorAll('details table')].filter(one => one.checkVisibility()).length"
    assert page.evaluate(shown) == 0
    page.locator("summary", has_text="Quality").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"{shown} === 1")
    page.emulate_media(media="print")
    everything = page.locator("details table").count()
    assert everything > 5
    page.wait_for_function(f"{shown} === {everything}")


@pytest.mark.parametrize("name", PAGES)
def test_dark_is_dark_and_paper_is_white(name, open_page):
    page, _, _ = open_page(name, "dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 24, 29)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_every_cell_of_the_mask_tells_what_it_is_when_pointed_at(open_page):
    page, _, _ = open_page("report.html")
    titles = page.locator("svg.ssp-mask g > title")
    assert titles.count() == 64
    assert "layer 0, head 0, key/value head 0" in titles.first.text_content()


def test_a_prompt_with_markup_is_shown_as_text(open_page):
    page, said, _ = open_page("uniform.html")
    assert said == [] and "<script>alert(1)</script>" in page.locator("body").text_content()


def test_screenshots(open_page):
    """What the README shows, where a folder for it is given."""
    folder = os.environ.get("SCREENSHOTS")
    if folder is None:
        pytest.skip("SCREENSHOTS names no folder")
    shown = "report.html"
    if own := os.environ.get("REPORT"):
        shown = Path(shutil.copy(own, Path(FOLDER) / "shown.html")).name
    page, _, _ = open_page(shown, size={"width": 1024, "height": 830})
    page.screenshot(path=Path(folder) / "report.png")
    page, _, _ = open_page("frontier.html", size={"width": 1100, "height": 700})
    page.locator(".scroll > svg").screenshot(path=Path(folder) / "frontier.png")
