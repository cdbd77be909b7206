"""The live line over 5,000 tests: its cost, and whether the screen is that of a run without it.

Run as `python -m tests.benchmarks.live [TESTS]` from the repository. Goals: the same screen and
scrollback, and at most 1 % of the run's time.
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
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pytest_gpushare.compat.pytest_terminal import LineBelow

from .scene import LIMIT

SIZE = (80, 24)
SUITE = """
import time
import pytest

@pytest.mark.parametrize("i", range({tests}))
def test_{name}(i):
    pass

def test_long():
    time.sleep(2)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite with dots and with -v, then measure what a write costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=int, nargs="?", default=5000)
    tests = parser.parse_args(arguments).tests
    from emulated import Terminal, live_lines, pytest_command, shown, without_live
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
        (path / "test_many.py").write_text(SUITE.format(tests=tests, name="many"))
        for options in ([], ["-v"]):
            began = time.monotonic()
            command = pytest_command("--gpu-share", "-n2", *options)
            terminal = Terminal(command, path, environment, SIZE)
            code = terminal.end(LIMIT)
            took = min(took, time.monotonic() - began)
            is_same = shown(terminal.parts, SIZE) == shown(without_live(terminal.parts), SIZE)
            drawn = len(live_lines(terminal.parts))
            words = "the same screen" if is_same else "ANOTHER SCREEN"
            how = " ".join(options) or "with dots"
            print(f"{tests} tests {how}: code {code}, {drawn} lines, {words}")
            failed |= not is_same or code != 0 or not drawn
    cost = tests * (cost_of_a_write(seen=True) - cost_of_a_write(seen=False))
    draws = took * 4 * cost_of_a_draw()
    part = (cost + draws) / took
    print(f"{cost * 1000:.1f} ms for {tests} dots and {draws * 1000:.1f} ms for drawing "
          f"in {took:.1f} s: {part:.2%} (goal: 1 %)")  # fmt: skip
    return int(failed or part > 0.01)


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
