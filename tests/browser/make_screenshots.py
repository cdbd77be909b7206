"""The pictures of the documentation, from a real run: `python -m tests.browser.make_screenshots`.

pytest runs the suite of `docs/examples/report` on a simulated machine, beside a simulated Ollama
that loads its model in the middle, and writes its report; Chromium opens that. Run it in an
environment with the plugin and the groups `test` and `browser`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.conftest import FLAGS
from playwright.sync_api import Browser, sync_playwright
from simulator import Device, Machine, build
from simulator.ollama import OllamaServer

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "docs" / "examples" / "report"
IMAGES = ROOT / "docs" / "images"
MODEL = "qwen2.5:14b"

LEFT_OUT = [part for name in ("cacheprovider", "hypothesispytest") for part in ("-p", f"no:{name}")]


def main() -> None:
    """Run the suite and photograph its report."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.html"
        run(Path(directory), report)
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or sys.exit("Chromium is not installed")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            for theme in ("light", "dark"):
                photograph(browser, report, theme)
            browser.close()


def run(directory: Path, report: Path) -> None:
    """Run pytest as a user would; the suite has a test that fails."""
    project = directory / "project"
    shutil.copytree(SUITE, project, ignore=shutil.ignore_patterns("__pycache__"))
    machine = Machine.create(directory / "vram", [Device(total="24GB", used="1.2GB")])
    with OllamaServer(machine, {MODEL: "10.8GB"}) as ollama:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST", "CUDA", "OLLAMA", "PYTHON", "GITHUB"))
        }
        environment.update(
            machine.env(build(directory).parent),
            OLLAMA_HOST=ollama.host,
            PYTEST_XDIST_AUTO_NUM_WORKERS="8",
            PYTHONDONTWRITEBYTECODE="1",
        )
        later = threading.Timer(20.0, ollama.load, [MODEL])
        later.start()
        command = [sys.executable, "-m", "pytest", *LEFT_OUT, "--gpu-share"]
        done = subprocess.run(
            [*command, "--gpu-share-report", str(report)],
            cwd=project,
            env=environment,
            timeout=300,
        )
        later.join(60)
    if done.returncode != 1 or not report.exists():
        sys.exit(f"pytest ended with {done.returncode}; the report: {report.exists()}")


def photograph(browser: Browser, report: Path, theme: str) -> None:
    """The top of the page, with the pointer on the timeline; and the whole of it."""
    context = browser.new_context(
        viewport={"width": 1200, "height": 1240}, color_scheme=theme, device_scale_factor=1.5
    )
    tab = context.new_page()
    tab.goto(report.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.screenshot(path=str(IMAGES / f"report-{theme}.png"))
    chart = tab.locator("#charts .u-over").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    tab.locator("#timeline").screenshot(path=str(IMAGES / f"timeline-{theme}.png"))
    context.close()


if __name__ == "__main__":
    main()
