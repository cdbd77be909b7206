"""The HTML report: how large it is, how long it takes to make, and to open in Chromium."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import documents
from browser.conftest import FLAGS
from playwright.sync_api import Browser, sync_playwright

from pytest_gpushare.report.html import page

# From the start of the navigation to the frame after everything was drawn.
_WATCH = """
new MutationObserver((_, watch) => {
    if (!document.documentElement?.dataset.ready) return;
    watch.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = performance.now(); }));
}).observe(document, { subtree: true, attributes: true, childList: true });
"""

# The longest of ten redraws of all charts, each at another zoom.
_ZOOM = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    let longest = 0;
    for (let turn = 0; turn < 10; turn++) {
        const before = performance.now();
        document.querySelector(`[data-zoom=${turn < 5 ? "in" : "out"}]`).click();
        await Promise.resolve();
        longest = Math.max(longest, performance.now() - before);
        await frame();
    }
    return longest;
}"""

# Sorting by name, the slowest column, and filling the table.
_SORT = """() => {
    const before = performance.now();
    document.querySelector("#test-table th button").click();
    return performance.now() - before;
}"""


def main() -> None:
    """Print a row for each size of run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    runs = {
        "24 tests, 24 s": documents.small(),
        "1,000 tests, 1 h": documents.large(1_000, 1),
        "10,000 tests, 24 h": documents.large(),
        "the same, 432,000 samples of each device": _unthinned(documents.large()),
        "50,000 tests, 24 h": documents.large(50_000),
    }
    chromium = shutil.which("chromium") or sys.exit("Chromium is not installed")
    print("| run | HTML | made in | opened in, median | most | zoom, most | sort by name |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, document in runs.items():
            before = time.perf_counter()
            text = page(document)
            made = time.perf_counter() - before
            path = Path(directory) / "report.html"
            path.write_text(text, encoding="utf-8")
            opened = [_open(browser, path) for _ in range(times)]
            times_open, zooms, sorts = zip(*opened, strict=True)
            print(
                f"| {name} | {path.stat().st_size / 1e6:.2f} MB | {made:.2f} s "
                f"| {statistics.median(times_open) / 1000:.2f} s | {max(times_open) / 1000:.2f} s "
                f"| {max(zooms):.0f} ms | {max(sorts):.0f} ms |"
            )
        browser.close()


def _open(browser: Browser, path: Path) -> tuple[float, float, float]:
    """Milliseconds to open, of the slowest zoom, and of a sort; in a context of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.add_init_script(_WATCH)
    tab.goto(path.as_uri())
    while (drawn := tab.evaluate("window.drawn")) is None:
        time.sleep(0.01)
    figures = (drawn, tab.evaluate(_ZOOM), tab.evaluate(_SORT))
    context.close()
    return figures


def _unthinned(document: dict[str, Any]) -> dict[str, Any]:
    """Samples at 5 Hz over the whole run, as if nobody had thinned them."""
    for samples in document["samples"]["devices"].values():
        old = len(samples["at_s"])
        at = [n * old // 432_000 for n in range(432_000)]
        step = samples["at_s"][-1] / 432_000
        for name in ("used_bytes", "ollama_bytes", "others_bytes"):
            samples[name] = [samples[name][index] for index in at]
        samples["workers_bytes"] = {
            worker: [values[index] for index in at]
            for worker, values in samples["workers_bytes"].items()
        }
        samples["at_s"] = [n * step for n in range(432_000)]
    return document


if __name__ == "__main__":
    main()
