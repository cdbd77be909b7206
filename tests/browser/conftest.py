"""The report's page in a real browser: Debian's Chromium, driven by Playwright.

Without them the tests are skipped, except on CI, where they must run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.report.html import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Kept after the tests, to be looked at; not in version control.
OUTPUT = Path(__file__).parent / "output"

# One worker runs them all, and first of all: each would start a Chromium of its own.
TOGETHER = pytest.mark.xdist_group("browser")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for all tests of a module: later tests of the worker find no process of it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed: pip install --group browser")
    if chromium is None:
        _missing("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def _missing(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


class Opened:
    """A page in the browser, and all that it did which it must not do."""

    def __init__(self, tab: Page) -> None:
        self.tab = tab
        self.wrong: list[str] = []
        tab.on("console", lambda said: self.wrong.append(f"console: {said.text}"))
        tab.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (self.wrong.append("dialog"), dialog.dismiss()))
        tab.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith("data:") and request.url != self.tab.url:
            self.wrong.append(f"request: {request.url}")

    def text(self, selector: str) -> str:
        """What a reader sees there."""
        return self.tab.locator(selector).first.inner_text()

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements."""
        return [" ".join(text.split()) for text in self.tab.locator(selector).all_inner_texts()]

    def says(self, selector: str, text: str) -> None:
        """Wait until it has this text. (wait_for_function needs eval, which the page forbids.)"""
        from playwright.sync_api import expect

        expect(self.tab.locator(selector)).to_have_text(text)

    def names(self) -> list[str]:
        """The node ids of the table, top to bottom."""
        return self.tab.locator("#test-table .nodeid").evaluate_all(
            "cells => cells.map(cell => cell.title)"
        )

    def view(self) -> tuple[float, float]:
        """The seconds that the timeline shows."""
        shown = self.tab.locator("#charts")
        return tuple(float(shown.get_attribute(f"data-{end}") or "nan") for end in ("from", "to"))  # type: ignore[return-value]

    def chart(self, number: int) -> Mapping[str, float]:
        """Where the field of a chart is on the screen, once it has been scrolled to."""
        over = self.tab.locator("#charts .u-over").nth(number)
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        return box


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open a page, or that of a document; ends with the check that the page did nothing wrong."""
    with ExitStack() as stack:
        pages: list[Opened] = []

        def open_page(document: Mapping[str, Any] | Path, **context: Any) -> Opened:
            if isinstance(document, Path):
                path = document
            else:
                path = tmp_path / f"report{len(pages)}.html"
                path.write_text(page(document), encoding="utf-8")
            options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
            made = browser.new_context(**{**options, **context})
            stack.callback(made.close)
            here = Opened(made.new_page())
            pages.append(here)
            # The page itself is the one thing that may be asked for.
            here.tab.once("request", lambda _: here.wrong.clear())
            here.tab.goto(path.as_uri())
            if context.get("java_script_enabled", True):
                here.tab.wait_for_selector("html[data-ready]", state="attached")
            return here

        yield open_page
        assert [wrong for here in pages for wrong in here.wrong] == []


@pytest.fixture
def output() -> Path:
    """Where screenshots are kept."""
    OUTPUT.mkdir(exist_ok=True)
    return OUTPUT
