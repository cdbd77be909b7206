"""Pictures of what people see first, to be looked at: `python -m tests.browser.make_screens`.

The documentation's pages in light and dark, and a run in a terminal of 80 and of 120 columns with
its live line. They go to `tests/browser/output`, which CI keeps and git ignores. Run it in an
environment with the plugin and the groups `test`, `browser` and `docs`.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyte
from browser.conftest import FLAGS
from emulated import Terminal, pytest_command
from playwright.sync_api import Browser, sync_playwright
from simulator import Device, Machine, build
from simulator.ollama import OllamaServer

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("output")
PAGES = ("index", "how-to/index", "how-to/guard-ollama", "reference/options")
LIMIT = 300.0

SUITE = """
import time
import gpusim, pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(20))
def test_gpu(i):
    with gpusim.alloc("3GB"):
        time.sleep(0.5)

@pytest.mark.parametrize("i", range(30))
def test_cpu(i):
    time.sleep(0.05)
"""

COLOURS = {"red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "cyan": "#56b6c2",
           "blue": "#61afef", "magenta": "#c678dd", "default": "#d8dee9"}  # fmt: skip


def main() -> None:
    """Make all pictures."""
    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or sys.exit("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        photograph_pages(browser, Path(folder))
        photograph_terminals(browser, Path(folder))
        browser.close()


def photograph_pages(browser: Browser, folder: Path) -> None:
    """The documentation's pages."""
    built = folder / "html"
    command = [sys.executable, "-m", "sphinx", "-q", str(ROOT / "docs"), str(built)]
    subprocess.run(command, check=True, timeout=LIMIT)
    for theme in ("light", "dark"):
        size = {"width": 1280, "height": 900}
        page = browser.new_page(viewport=size, color_scheme=theme)
        for name in PAGES:
            page.goto((built / f"{name}.html").as_uri())
            page.screenshot(path=OUTPUT / f"docs-{name.replace('/', '-')}-{theme}.png")
        page.close()


def photograph_terminals(browser: Browser, folder: Path) -> None:
    """A run with its live line, in the middle and at its end."""
    project = folder / "project"
    project.mkdir()
    (project / "test_suite.py").write_text(SUITE)
    machine = Machine.create(folder / "vram", [Device(total="24GB", used="2GB")])
    with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}) as ollama:
        ollama.load("qwen2.5:14b")
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("CI", "TERM", "GITHUB_ACTIONS")},
            **machine.env(build(folder).parent),
            "OLLAMA_HOST": ollama.host,
            "PYTEST_GPUSHARE_LEASES": str(folder / "leases"),
            "PYTEST_XDIST_AUTO_NUM_WORKERS": "8",
        }
        for columns in (80, 120):
            command = pytest_command("--gpu-share", "-o", "gpu_share_cpu_workers=1")
            terminal = Terminal(command, project, environment, (columns, 30))
            terminal.read_until(lambda text: "tests 7" in text, LIMIT)
            picture(browser, terminal, f"terminal-{columns}-live")
            terminal.end(LIMIT)
            picture(browser, terminal, f"terminal-{columns}-end")


def picture(browser: Browser, terminal: Terminal, name: str) -> None:
    """The terminal's screen as an image."""
    screen = pyte.Screen(*terminal.size)
    stream = pyte.ByteStream(screen)
    stream.feed(terminal.written.encode())
    rows = []
    for at in range(terminal.size[1]):
        cells = (screen.buffer[at][column] for column in range(terminal.size[0]))
        rows.append(
            "".join(
                f'<span style="color:{COLOURS.get(cell.fg, cell.fg)};'
                f'font-weight:{"bold" if cell.bold else "normal"}">{html.escape(cell.data)}</span>'
                for cell in cells
            )
        )
    style = "background:#1e2227;margin:0;padding:12px;font:14px/1.3 'DejaVu Sans Mono',monospace"
    page = browser.new_page(viewport={"width": 9 * terminal.size[0] + 40, "height": 600})
    page.set_content(f'<pre style="{style}">{"<br>".join(rows)}</pre>')
    page.screenshot(path=OUTPUT / f"{name}.png")
    page.close()


if __name__ == "__main__":
    main()
