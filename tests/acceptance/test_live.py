"""The live line below pytest's output: what stands on the screen is what a run without it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import Terminal, live_lines, shown, without_live
from inner_pytest import inner_command
from simulator import Machine

from .conftest import Project

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

SLOW = """
    import time
    import pytest

    @pytest.mark.parametrize("i", range(60))
    def test_dot(i):
        time.sleep(0.03)

    def test_long():
        time.sleep(1.2)

    def test_fails():
        time.sleep(0.3)
        assert 0
"""

LINE = re.compile(
    r"gpu-share: GPU 0 [▁▂▃▄▅▆▇]{4} \d+\.\d of 24 GB( · tests \d+\.\d)?( · Ollama \d+\.\d)?"
    r"( · \d+/\d+)?"
)


@pytest.fixture
def start(project: Project, machine: Machine) -> Callable[..., Terminal]:
    """Start pytest in a terminal."""
    project.write(test_project=SLOW)
    project.environment.pop("TERM")

    def begin(*arguments: str, size: tuple[int, int] = (80, 24), **environment: str) -> Terminal:
        command = inner_command("--gpu-share", *arguments)
        return Terminal(command, project.path, {**project.environment, **environment}, size)

    return begin


def check_screen(terminal: Terminal, size: tuple[int, int], least: int = 1) -> list[str]:
    """The line was drawn, and left nothing behind. Returns what stands there."""
    drawn = live_lines(terminal.parts)
    assert len(drawn) >= least, terminal.written[-3000:]
    assert all(len(text) < size[0] for text in drawn)
    with_it, without = shown(terminal.parts, size), shown(without_live(terminal.parts), size)
    assert with_it == without
    assert not any(LINE.match(row) for row in with_it)
    return with_it


MODES = {
    "dots": [],
    "verbose": ["-v"],
    "live_log": ["-o", "log_cli=true", "-o", "log_cli_level=INFO"],
    "warnings": ["-p", "conftest_prints"],
    "instant_failures": ["-p", "pytest_instafail"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [24, 8])
def test_same_screen(
    mode: str, rows: int, project: Project, start: Callable[..., Terminal]
) -> None:
    """Dots, lines, live logging, and a plugin that prints to both streams in the controller."""
    project.write(
        conftest_prints="""
            import os, sys, warnings

            def pytest_runtest_logreport(report):
                # What a worker writes to the same terminal cannot be seen by the controller.
                if "PYTEST_XDIST_WORKER" in os.environ:
                    return
                if report.when == "call" and report.nodeid.endswith(("7]", "fails")):
                    print("a plugin prints", report.nodeid)
                    print("and part of a line", end="")
                    sys.stderr.write("to standard error\\n")
                    sys.stderr.write("not ended ")
                    warnings.warn("a warning")
        """,
        # As the plugin of that name does it.
        pytest_instafail="""
            import pytest
            from _pytest.terminal import TerminalReporter

            class Reporter(TerminalReporter):
                def pytest_runtest_logreport(self, report):
                    super().pytest_runtest_logreport(report)
                    if report.failed:
                        self._tw.line()
                        report.toterminal(self._tw)

            @pytest.hookimpl(trylast=True)
            def pytest_configure(config):
                old = config.pluginmanager.getplugin("terminalreporter")
                if old:
                    config.pluginmanager.unregister(old)
                    config.pluginmanager.register(Reporter(config), "terminalreporter")
        """,
    )
    terminal = start("-n2", *MODES[mode], size=(80, rows))
    assert terminal.end() == 1
    check_screen(terminal, (80, rows), least=3)
    drawn = live_lines(terminal.parts)
    assert [text for text in drawn if not LINE.fullmatch(text)] == []
    assert drawn[-1].endswith("/62")


def test_at_most_four_times_a_second(start: Callable[..., Terminal]) -> None:
    """The dots of a row leave the line where it is; it is drawn anew by the timer alone."""
    terminal = start("-n2")
    began = time.monotonic()
    assert terminal.end() == 1
    drawn = len(live_lines(terminal.parts))
    rows = terminal.written.count("\n")
    assert drawn <= 4 * (time.monotonic() - began) + rows


def test_resize(start: Callable[..., Terminal]) -> None:
    """Narrower, lower, wider: the line follows, and nothing of it is left."""
    terminal = start("-n2", size=(100, 24))
    terminal.read_until(lambda text: "of 24 GB" in text)
    terminal.resize((60, 24))
    terminal.read_until(lambda text: text.count("/62") > 3)
    terminal.resize((120, 24))
    assert terminal.end() == 1
    assert shown(terminal.parts, (100, 24)) == shown(without_live(terminal.parts), (100, 24))
    assert live_lines(terminal.parts)


@pytest.mark.parametrize("how", ["crash", "interrupt", "failed_at_once"])
def test_ends(how: str, project: Project, start: Callable[..., Terminal]) -> None:
    """A worker that crashes, Ctrl-C, and -x: the line is gone before pytest's last words."""
    if how == "crash":
        text = SLOW + "\n    def test_crashes():\n        time.sleep(0.5)\n        import os\n"
        project.write(test_project=text + "        os.kill(os.getpid(), 9)\n")
    terminal = start("-n2", *(["-x"] if how == "failed_at_once" else []))
    if how == "interrupt":
        # A test has run: no worker is being configured any more.
        terminal.read_until(lambda text: re.search(r" [1-9]\d*/62", text) is not None)
        terminal.interrupt()
    code = terminal.end()
    assert code == (2 if how == "interrupt" else 1) or how == "failed_at_once"
    rows = check_screen(terminal, (80, 24))
    words = {"crash": "crashed while running", "interrupt": "KeyboardInterrupt"}
    assert any(words.get(how, "stopping after 1 failures") in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["-q"], {}),
        (["-s"], {}),
        (["-p", "no:capture"], {}),
        (["-n0"], {}),
        (["-o", "gpu_share_live=off"], {}),
        ([], {"TERM": "dumb"}),
        ([], {"CI": "true"}),
        (["-p", "sugar_like"], {}),
        (["-p", "terminalprogress"], {}),
    ],
    ids=" ".join,
)
def test_off(
    arguments: list[str],
    environment: dict[str, str],
    project: Project,
    start: Callable[..., Terminal],
) -> None:
    """Where the last row is somebody else's, or nobody looks."""
    if "terminalprogress" in arguments and pytest.version_tuple < (9, 0, 2):
        pytest.skip("pytest has no progress of its own in a terminal")
    project.write(
        test_project="import time\n\ndef test_a():\n    time.sleep(0.6)\n",
        sugar_like="""
            import pytest
            from _pytest.terminal import TerminalReporter

            class Sugar(TerminalReporter):
                pass

            @pytest.hookimpl(trylast=True)
            def pytest_configure(config):
                old = config.pluginmanager.getplugin("terminalreporter")
                config.pluginmanager.unregister(old)
                config.pluginmanager.register(Sugar(config), "terminalreporter")
        """,
    )
    terminal = start("-n1", *arguments, **environment)
    assert terminal.end() == 0
    assert live_lines(terminal.parts) == []
    assert "\x1bD" not in terminal.written


def test_narrow(start: Callable[..., Terminal]) -> None:
    """A terminal of less than 40 columns has no line."""
    terminal = start("-n2", "-k", "long", size=(39, 24))
    assert terminal.end() == 0
    assert live_lines(terminal.parts) == []


def test_ascii(start: Callable[..., Terminal]) -> None:
    """An encoding without blocks gets other signs."""
    terminal = start("-n2", "-k", "long", PYTHONIOENCODING="ascii")
    assert terminal.end() == 0
    drawn = live_lines(terminal.parts)
    assert drawn
    # What tests hold is unknown until NVML has told its processes.
    line = re.compile(
        r"gpu-share: GPU 0 [#_.=*+-]{4} \d+\.\d of 24 GB( \| tests \d+\.\d)?( \| \d/1)?"
    )
    assert [text for text in drawn if not line.fullmatch(text)] == []


def test_piped(project: Project, machine: Machine) -> None:
    """A pipe gets no code of a terminal, whatever the setting."""
    project.write(test_project=SLOW)
    result = project.pytest(
        "--gpu-share", "-n2", "-k", "long", "-o", "gpu_share_live=on", TERM="xterm"
    )
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    assert os.linesep + "gpu-share: GPU 0 ▇" not in result.out


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_height_changes(project: Project, machine: Machine, tmp_path: Path) -> None:
    """A terminal that gets lower and higher keeps every row, and nothing of the line."""
    project.write(
        test_project="""
        import os, time
        import pytest

        @pytest.mark.parametrize("i", range(90))
        def test_dot(i):
            until = time.monotonic() + 60
            while i in (30, 60) and not os.path.exists(f"seen-{i}") and time.monotonic() < until:
                time.sleep(0.05)
        """
    )
    socket = tmp_path / "tmux"

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-S", str(socket), "-f", os.devnull, *arguments]
        environment = {**project.environment, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=30)
        return done.stdout.decode()

    def wait(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < until, tmux("capture-pane", "-p", "-S", "-")
            time.sleep(0.05)

    def is_over() -> bool:
        return tmux("display-message", "-p", "#{pane_dead}") == "1\n"

    def is_drawn() -> bool:
        return " of 24 GB" in tmux("capture-pane", "-p")

    kept = ["set", "-g", "remain-on-exit", "on", ";", "set", "-g", "remain-on-exit-format", ""]
    command = shlex.join(inner_command("--gpu-share", "-n1"))
    begun = ["new-session", "-d", "-x", "80", "-y", "24", "-c", str(project.path), command]
    tmux("start-server", ";", *kept, ";", "set", "-g", "status", "off", ";", *begun)
    try:
        for rows, seen in ((24, ""), (9, "seen-30"), (14, ""), (6, ""), (30, "seen-60")):
            tmux("resize-window", "-x", "80", "-y", str(rows))
            wait(is_drawn)
            if seen:
                (project.path / seen).touch()
        wait(is_over)
        history = tmux("capture-pane", "-p", "-S", "-").rstrip()
    finally:
        tmux("kill-server")
    rows_of_dots = re.findall(r"(?m)^([.F]+) +\[ *\d+%\]$", history)
    assert "".join(rows_of_dots) == "." * 90, history
    assert " of 24 GB" not in history
    assert history.count("test session starts") == history.count("90 passed") == 1
