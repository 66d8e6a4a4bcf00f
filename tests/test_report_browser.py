"""The pages in a browser: nothing fails, nothing is cut off, all can be reached, read in every colour, and printed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import run_folder, whole_run

from yolo_prune.pipeline.report import CompareConfig, ReportConfig, compare, report

pytestmark = pytest.mark.slow

WIDTHS = {"phone": 390, "desktop": 1280}

TEXTS = """() => {
  // Colours as [red, green, blue, alpha], whatever notation the browser computes them in.
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error("a background that shines through");
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ["title", "desc", "style"].includes(element.tagName.toLowerCase())) continue;
    const style = getComputedStyle(element);
    const colour = rgba(element.closest("svg") ? style.fill : style.color);
    const [light, dark] = [luminance(colour), luminance(ground(element))].sort((a, b) => b - a);
    const text = element.textContent.trim().slice(0, 40);
    found.push({text, alpha: colour[3], ratio: (light + 0.05) / (dark + 0.05)});
  }
  return found;
}"""
"""Every element with text of its own: what it says, and the contrast ratio of WCAG 2 with its background."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=root)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report with every section, one of a run that has just begun, and a comparison."""
    folder = tmp_path_factory.mktemp("runs with ümläuts")
    full, words = whole_run(folder / "run")
    more = dict(word.split("=", 1) for word in words)
    begun = run_folder(folder / ("begun" * 12))  # a long name has to wrap
    for path in (begun / "summary.json", begun / "stages" / "widths.json", begun / "dense" / "sparsity.json"):
        path.unlink()
    other = run_folder(folder / "other", seed=1)
    compare(CompareConfig(runs=f"{full},{other},{begun}", out=str(folder / "compare.html")))
    return {
        "whole": report(ReportConfig(run=str(full), **more)).path,
        "begun": report(ReportConfig(run=str(begun))).path,
        "compare": folder / "compare.html",
    }


@pytest.fixture
def show(browser, pages):
    """Open a page; whatever it fetches or complains of is kept."""
    opened = []

    def shown(name: str, *, width: str = "desktop", scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": WIDTHS[width], "height": 844}, color_scheme=scheme)
        page.said, page.fetched = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.fetched.append(request.url))
        page.goto(pages[name].as_uri())
        opened.append(page)
        return page

    yield shown
    for page in opened:
        page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["whole", "begun", "compare"])
def test_it_complains_of_nothing_fetches_nothing_and_fits(show, pages, name, width):
    page = show(name, width=width)
    assert page.said == []
    assert [url for url in page.fetched if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width]
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


def test_facts_in_words_wrap_on_a_phone(show):
    page = show("whole", width="phone")
    cut = "(table) => table.scrollWidth > table.parentElement.clientWidth"
    tables = page.locator("section[aria-labelledby=methods] table.facts")
    assert tables.count() == 5
    assert [table.evaluate(cut) for table in tables.all()] == [False] * 5


@pytest.mark.parametrize("chosen", ["auto", "light", "dark"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["whole", "compare"])
def test_every_text_can_be_read_in_both_colours(show, name, scheme, chosen):
    page = show(name, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.check(f"#theme-{chosen}", force=True)
    texts = page.evaluate(TEXTS)
    assert len(texts) > 50
    assert any(text["text"] == "mAP50-95 val" for text in texts)  # of a table and of a plot
    assert [text for text in texts if text["ratio"] < 4.5 or text["alpha"] < 1.0] == []
    shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = chosen == "dark" or (chosen == "auto" and scheme == "dark")
    assert shown == ("rgb(14, 18, 22)" if dark else "rgb(245, 246, 248)")


def test_keys_alone_reach_everything_in_the_order_of_the_page(show):
    page = show("whole")
    wanted = page.evaluate(
        "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"], #theme-auto')]"
        ".map((element, place) => { element.dataset.place = place; return place; })"
    )
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("Number(document.activeElement.dataset.place)"))
        style = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])"
            "(getComputedStyle(document.activeElement.closest('label') ?? document.activeElement))"
        )
        assert style == ["solid", "3px"]  # it shows where one is
    assert reached == wanted

    page.focus("#theme-auto")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("#theme-dark")
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")


def test_accessibility_rules_hold(show):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    for name in ("whole", "compare"):
        found = axe.Axe().run(show(name, width="phone")).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found] == []


def test_it_prints_with_all_that_is_folded(show, tmp_path):
    page = show("whole", scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    layers = page.get_by_text("model.2.m.0.cv1.conv")  # in a folded table
    assert layers.evaluate("(cell) => cell.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})")
    assert layers.bounding_box()["height"] > 0
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
