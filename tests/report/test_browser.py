"""The page in a real browser: nothing loaded, nothing said on the console, readable and usable.

Needs a Chromium (Debian's `chromium`, or what `PUZZLE_CHROMIUM` names) and the packages playwright
and axe-playwright-python of the extra `dev`; skipped with a line where they are missing.
"""

import os
import shutil

import pytest

from puzzle.commands.summary import summaries
from puzzle.report import compare
from puzzle.report.stage import page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("PUZZLE_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(finished_run) -> str:
    return page(finished_run.child_job("main")).resolve().as_uri()


@pytest.fixture(scope="module")
def compared(finished_run) -> str:
    found = summaries([finished_run])
    kept = {"value": 0.9, "low": 0.88, "high": 0.92}
    shown = [type(one).model_validate(one.as_json() | {"retention": kept}) for one in found]
    return compare.write(finished_run, shown).resolve().as_uri()


class Opened:
    """A page, and what it has said and asked for."""

    def __init__(self, browser, address, size="desktop", scheme="light") -> None:
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.said, self.asked = [], []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def __getattr__(self, name):
        return getattr(self.page, name)


@pytest.mark.parametrize("which", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_quiet_fits_and_is_accessible(
    browser, address, compared, size, scheme, which, tmp_path_factory
):
    at = address if which == "report" else compared
    opened = Opened(browser, at, size, scheme)
    width = SIZES[size][0]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(opened.page).response["violations"]
    serious = [
        (one["id"], [node["html"][:100] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in SERIOUS
    ]
    assert serious == []
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    path = tmp_path_factory.getbasetemp() / f"{which}-{size}-{scheme}.png"
    opened.screenshot(path=path, full_page=True)
    print(f"screenshot: {path}")
    assert path.stat().st_size > 10_000


def test_pointing_at_a_layer_shows_its_alternatives(browser, address, finished_run):
    opened = Opened(browser, address)
    marks = opened.locator('.strip .mark[data-layer="2"]')
    marks.first.hover()
    tip = opened.locator("#tip")
    assert tip.is_visible() and "layer 2: " in tip.inner_text()
    panel = opened.locator("#layer")
    assert panel.locator("h3").inner_text().startswith("Layer 2: ")
    rows = panel.locator("tbody tr").count()
    assert rows == len(finished_run.space.layers[2].blocks)
    assert panel.locator("tr.chosen").count() == 1
    opened.mouse.move(1, 1)
    assert not tip.is_visible()


def test_the_keyboard_goes_from_mark_to_mark(browser, address):
    opened = Opened(browser, address)
    opened.locator(".strip .mark").first.focus()
    for _ in range(2):
        opened.keyboard.press("ArrowRight")
    assert opened.locator("#layer h3").inner_text().startswith("Layer 2: ")
    assert "layer 2: " in opened.locator("#tip").inner_text()
    opened.keyboard.press("Home")
    assert opened.locator("#layer h3").inner_text().startswith("Layer 0: ")
    opened.keyboard.press("Escape")
    assert not opened.locator("#tip").is_visible()
    # one stop for each chart: Tab leaves it
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.closest('.strip') === null")


def test_a_point_of_the_frontier_gives_its_command(browser, address):
    opened = Opened(browser, address)
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    point = opened.locator(".mark[data-solution]").nth(2)
    number = point.get_attribute("data-solution")
    point.click()
    panel = opened.locator("#solution")
    assert panel.locator("h3").inner_text().startswith(f"Solution {number}: ")
    command = panel.locator("code").inner_text()
    assert command.startswith("puzzle child ") and f"--solution {number} --of main" in command
    panel.get_by_role("button", name="Copy the command").click()
    panel.get_by_role("button", name="Copied").wait_for(timeout=5000)  # the clipboard takes time
    assert opened.evaluate("navigator.clipboard.readText()") == command


def test_the_page_reads_without_its_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(address)
    titles = opened.locator("svg.chart .mark title").count()
    assert titles > 20 and opened.locator("h1").is_visible()
