"""The live line over 5,000 tests: its cost, and whether the screen is that of a run without it.

Run as `python -m tests.benchmarks.live [TESTS] [--only SCENES]` from the repository. Goals: the
same screen and scrollback, and at most 1 % of the run's time.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from pytest_gpushare.report.live_line import LineBelow

from .scene import LIMIT

SIZE = (80, 24)
SUITE = """
import logging, os, sys, time, warnings
import pytest

MODE = {mode!r}

@pytest.mark.parametrize("i", range({tests}))
def test_many(i):
    if i % 500 == 7 and MODE in ("fails", "logs", "warns"):
        logging.getLogger().warning("a line of the log")
        warnings.warn("a warning")
        assert MODE != "fails"
    if i == {tests} // 2 and MODE == "crash":
        os.kill(os.getpid(), 9)

def test_long():
    time.sleep({long})
"""
PRINTS = """
import os, sys

def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" and report.nodeid.endswith("07]"):
        print("a plugin prints", report.nodeid)
        print("and part of a line", end="")
        sys.stderr.write("to standard error\\n")
        sys.stderr.write("not ended ")
"""

SCENES: dict[str, tuple[str, list[str]]] = {
    "dots": ("", []),
    "verbose": ("", ["-v"]),
    "instant failures": ("fails", ["--instafail"]),
    "live log": ("logs", ["-o", "log_cli=true", "-o", "log_cli_level=INFO"]),
    "warnings and prints": ("warns", ["-p", "prints"]),
    "resized": ("", []),
    "crash": ("crash", []),
    "interrupt": ("", []),
}
"""What happens, and the options of pytest."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite in each scene, then measure what a write costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=int, nargs="?", default=5000)
    parser.add_argument("--long", type=float, default=2.0, help="seconds of the last test")
    parser.add_argument("--only", default=",".join(SCENES), help="scenes, separated by commas")
    options = parser.parse_args(arguments)
    from simulator import Device, Machine, build

    failed = False
    took = LIMIT
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        machine = Machine.create(path / "vram", [Device(total="24GB", used="2GB")])
        environment = {**os.environ, **machine.env(build(path / "nvml").parent)}
        for name in ("CI", "GITHUB_ACTIONS", "TERM"):
            environment.pop(name, None)
        environment["PYTEST_GPUSHARE_LEASES"] = f"{folder}-leases"
        (path / "prints.py").write_text(PRINTS)
        for name in options.only.split(","):
            mode, arguments = SCENES[name]
            if name == "instant failures" and not find_spec("pytest_instafail"):
                print(f"{name}: not run, pytest-instafail is not installed")
                continue
            suite = SUITE.format(mode=mode, tests=options.tests, long=options.long)
            (path / "test_many.py").write_text(suite)
            seconds, is_right = run(name, arguments, path, environment)
            took, failed = min(took, seconds), failed or not is_right
    cost = options.tests * (cost_of_a_write(seen=True) - cost_of_a_write(seen=False))
    draws = took * 4 * cost_of_a_draw()
    part = (cost + draws) / took
    print(f"{cost * 1000:.1f} ms for {options.tests} dots and {draws * 1000:.1f} ms for drawing "
          f"in {took:.1f} s: {part:.2%} (goal: 1 %)")  # fmt: skip
    return int(failed or part > 0.01)


def run(
    name: str, arguments: Sequence[str], path: Path, environment: Mapping[str, str]
) -> tuple[float, bool]:
    """Run the suite. Returns the seconds, and whether the screen is that of a run without line."""
    from emulated import Terminal, live_lines, shown, without_live
    from inner_pytest import inner_command

    began = time.monotonic()
    command = inner_command("--gpu-share", "-n2", *arguments)
    terminal = Terminal(command, path, environment, SIZE)
    if name == "resized":
        # Of one height: pyte loses the rows by which a screen gets lower. test_live.py has tmux.
        for count, size in ((3, (60, 24)), (9, (120, 24)), (15, (90, 24))):
            terminal.read_until(lambda text, count=count: text.count(" of 24 GB") > count)
            terminal.resize(size)
    if name == "interrupt":
        terminal.read_until(lambda text: text.count(" of 24 GB") > 9)
        terminal.interrupt()
    code = terminal.end(LIMIT)
    took = time.monotonic() - began
    is_same = shown(terminal.parts, SIZE) == shown(without_live(terminal.parts), SIZE)
    drawn = len(live_lines(terminal.parts))
    words = "the same screen" if is_same else "ANOTHER SCREEN"
    print(f"{name}: code {code}, {took:.1f} s, {drawn} lines, {words}", flush=True)
    expected = {"instant failures": 1, "crash": 1, "interrupt": 2}.get(name, 0)
    return took, is_same and drawn > 0 and code == expected


def cost_of_a_write(*, seen: bool, count: int = 20_000) -> float:
    """Seconds of this thread for one dot, where writes are seen and where they are not."""
    master, file = _terminal()
    below = LineBelow(file)
    if seen:
        below.install()
        below.show("gpu-share: a line")
    began = time.thread_time()
    for at in range(count):
        file.write("\x1b[32m.\x1b[0m")
        file.flush()
        if at % 60 == 0:
            file.write("\n")
            os.read(master, 65536)
    took = time.thread_time() - began
    below.remove()
    return took / count


def cost_of_a_draw(count: int = 500) -> float:
    """Seconds of this thread for one line that is drawn again."""
    master, file = _terminal()
    below = LineBelow(file)
    below.install()
    began = time.thread_time()
    for at in range(count):
        below.show(f"gpu-share: GPU 0 ▇▇▇▂ 19.5 of 24 GB · tests 7.4 · Ollama 10.1 · {at}/600")
        os.read(master, 65536)
    took = time.thread_time() - began
    below.remove()
    return took / count


def _terminal() -> tuple[int, TextIO]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return master, os.fdopen(slave, "w", buffering=1, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
