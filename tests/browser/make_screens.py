"""Pictures of what people see first, to be looked at: `python -m tests.browser.make_screens`.

The documentation, the report's page, and the terminal in tmux; in `tests/browser/output`, which CI
keeps and git ignores. A page or a table that is wider than a phone is an error, and so is a
section that doctor names and that is not there. Run it in an environment
with the plugin and the groups `test` and `browser`; with the folder of the built documentation as
an argument, or with the group `docs` too.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyte
from browser.conftest import FLAGS
from inner_pytest import inner_command
from playwright.sync_api import Browser, sync_playwright
from simulator import Device, Machine, build
from simulator.ollama import OllamaServer

from pytest_gpushare.cli.doctor import PAGE as DOCTOR

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("output")
PAGES = ("index", "how-to/index", "how-to/guard-ollama", "reference/options")
WINDOWS = {"light": ("light", 1280), "dark": ("dark", 1280), "400": ("light", 400)}
WIDE = """() => [document.documentElement, ...document.querySelectorAll('.table-wrapper')]
    .filter(each => each.scrollWidth > each.clientWidth + 1)
    .map(each => each.innerText.slice(0, 60))"""
ROWS = 44
LIMIT = 300.0

SUITE = """
import os, time
from pathlib import Path
import gpusim, pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(8))
def test_gpu(i):
    with gpusim.alloc("3GB"):
        time.sleep(0.3)

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(2))
def test_held(i):
    with gpusim.alloc(os.environ["HELD"]):
        while not Path("seen").exists():
            time.sleep(0.1)

@pytest.mark.parametrize("i", range(30))
def test_cpu(i):
    time.sleep(0.05)
"""

COLOURS = {"red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "cyan": "#56b6c2",
           "blue": "#61afef", "magenta": "#c678dd", "default": "#d8dee9"}  # fmt: skip


def main(built: str = "") -> None:
    """Make all pictures."""
    shutil.rmtree(OUTPUT / "screens", ignore_errors=True)
    (OUTPUT / "screens").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or sys.exit("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        pages = Path(built) if built else build_pages(Path(folder) / "html")
        check_pages(browser, pages)
        for name in PAGES:
            photograph(browser, pages / f"{name}.html", f"docs-{name.replace('/', '-')}")
        photograph_runs(browser, Path(folder))
        browser.close()


def build_pages(built: Path) -> Path:
    """The documentation as Sphinx builds it."""
    command = [sys.executable, "-m", "sphinx", "-q", str(ROOT / "docs"), str(built)]
    subprocess.run(command, check=True, timeout=LIMIT)
    return built


def check_pages(browser: Browser, built: Path) -> None:
    """On a phone nothing scrolls sideways; the sections that doctor names are there."""
    page = browser.new_page(viewport={"width": 400, "height": 1200})
    for path in sorted(built.rglob("*.html")):
        page.goto(path.resolve().as_uri())
        if wide := page.evaluate(WIDE):
            sys.exit(f"{path}: in a window of 400 pixels these scroll sideways: {wide}")
    page.goto((built / f"{DOCTOR}.html").resolve().as_uri())
    anchors = set(page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)"))
    text = (ROOT / "docs" / f"{DOCTOR}.md").read_text(encoding="utf-8")
    if missing := set(re.findall(r"(?m)^### (\S+)$", text)) - anchors:
        sys.exit(f"{DOCTOR}.html has no anchors {sorted(missing)}")
    page.close()


def photograph(browser: Browser, path: Path, name: str) -> None:
    """The top of a page, in every window."""
    for window, (theme, width) in WINDOWS.items():
        size = {"width": width, "height": 1200}
        page = browser.new_page(viewport=size, color_scheme=theme)
        page.goto(path.resolve().as_uri())
        page.screenshot(path=OUTPUT / "screens" / f"{name}-{window}.png")
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            sys.exit(f"{path}: {wide} pixels wide in a window of {width}")
        page.close()


def photograph_runs(browser: Browser, folder: Path) -> None:
    """Two runs, the second with a model that does not fit; their pages; and the command."""
    project = folder / "project"
    project.mkdir()
    (project / "test_suite.py").write_text(SUITE)
    machine = Machine.create(folder / "vram", [Device(total="24GB", used="2GB")])
    with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}) as ollama:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CI", "GITHUB", "TERM"))}
        environment = {
            **kept,
            **machine.env(build(folder).parent),
            "OLLAMA_HOST": ollama.host,
            "PYTEST_GPUSHARE_LEASES": str(folder / "leases"),
            "PYTEST_XDIST_AUTO_NUM_WORKERS": "8",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
        }

        def run(*arguments: str) -> str:
            common = ("--gpu-share", "-o", "gpu_share_cpu_workers=1")
            return shlex.join(inner_command(*common, *arguments))

        seen = project / "seen"

        def pane(columns: int, command: str) -> Pane:
            return Pane(browser, (columns, ROWS), command, project, environment)

        ollama.load("qwen2.5:14b")
        reports = [project / f"{name}.{kind}" for name in "ab" for kind in ("json", "html")]
        written = [f"--gpu-share-report={report}" for report in reports]
        with pane(120, f"HELD=3.5GB {run(*written[:2])}") as terminal:
            terminal.wait(lambda text: "· tests 8" in text)
            terminal.picture("terminal-120-live")
            with pane(80, "pytest-gpushare watch") as watch:
                watch.wait(lambda text: "gw1" in text and "tests 8" in text)
                watch.picture("watch-80")
            seen.touch()
            terminal.end("terminal-120-end")
        seen.unlink()
        ollama.unload("qwen2.5:14b")
        too_small = ("-o", "gpu_share_ollama_vram_reservation_mb=4096")
        with pane(80, f"HELD=7GB {run(*written[2:], *too_small)}") as terminal:
            terminal.wait(lambda text: "· tests 15" in text)
            ollama.load("qwen2.5:14b")
            terminal.wait(lambda text: "· Ollama" in text)
            terminal.picture("terminal-80-live")
            seen.touch()
            terminal.end("terminal-80-end")
        for name, arguments in (
            ("plan", "plan -v"),
            ("doctor", "doctor"),
            ("compare", f"compare {reports[0]} {reports[2]} -o {folder / 'compare.html'}"),
            ("help", ""),
            ("typing-error", "comapre"),
        ):
            with pane(80, f"pytest-gpushare {arguments}") as terminal:
                terminal.end(f"command-{name}-80")
    photograph(browser, reports[1], "report")
    photograph(browser, reports[3], "report-spill")
    photograph(browser, folder / "compare.html", "compare")


class Pane:
    """A command in a terminal of tmux."""

    def __init__(
        self,
        browser: Browser,
        size: tuple[int, int],
        command: str,
        cwd: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._browser, self._size, self._environment = browser, size, environment
        self._socket = cwd.parent / f"tmux-{size[0]}-{time.monotonic_ns()}"
        columns, rows = (str(number) for number in size)
        kept = ("set", "-g", "remain-on-exit", "on", ";", "set", "-g", "remain-on-exit-format", "")
        started = ("new-session", "-d", "-x", columns, "-y", rows, "-c", str(cwd), command)
        self._tmux("start-server", ";", *kept, ";", "set", "-g", "status", "off", ";", *started)

    def __enter__(self) -> Pane:
        """Nothing: it has been started."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        self._tmux("kill-server")

    def wait(self, condition: Callable[[str], bool]) -> None:
        """Wait until the text on the screen meets it."""
        until = time.monotonic() + LIMIT
        while not condition(text := self._tmux("capture-pane", "-p")):
            if time.monotonic() > until or self._is_over():
                sys.exit(f"the terminal does not come to show it:\n{text}")
            time.sleep(0.1)

    def end(self, name: str) -> None:
        """Wait for the end of the command, and make a picture of what stands there then."""
        until = time.monotonic() + LIMIT
        while not self._is_over() and time.monotonic() < until:
            time.sleep(0.1)
        self.picture(name)

    def picture(self, name: str) -> None:
        """The screen as an image."""
        screen = pyte.Screen(*self._size)
        text = self._tmux("capture-pane", "-e", "-p").rstrip("\n")
        pyte.ByteStream(screen).feed(text.replace("\n", "\r\n").encode())
        rows = (screen.buffer[at] for at in range(text.count("\n") + 1))
        body = "<br>".join(
            "".join(map(_cell, (row[at] for at in range(self._size[0])))) for row in rows
        )
        style = (
            "background:#1e2227;margin:0;padding:12px;font:14px/1.3 'DejaVu Sans Mono',monospace;"
            "width:max-content"
        )
        page = self._browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_content(f'<pre style="{style}">{body}</pre>')
        page.locator("pre").screenshot(path=OUTPUT / "screens" / f"{name}.png")
        page.close()

    def _is_over(self) -> bool:
        return self._tmux("display-message", "-p", "#{pane_dead}").strip() == "1"

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._socket), "-f", os.devnull, *arguments]
        environment = dict(self._environment)
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, timeout=30
        )
        return done.stdout.decode()


def _cell(cell: pyte.screens.Char) -> str:
    colour = COLOURS.get(cell.fg, f"#{cell.fg}")
    weight = "bold" if cell.bold else "normal"
    return f'<span style="color:{colour};font-weight:{weight}">{html.escape(cell.data)}</span>'


if __name__ == "__main__":
    main(*sys.argv[1:])
