"""The line below a terminal's output, and what happens without pytest's private name."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from _pytest.terminal import TerminalReporter

from pytest_gpushare.compat.pytest_options import captures_output, reporter_file, shows_progress
from pytest_gpushare.report.live_line import DRAW, RESTORE, LineBelow, is_drawable
from pytest_gpushare.text import cut

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

REMOVE = DRAW + RESTORE


@pytest.fixture
def opened() -> Iterator[tuple[int, TextIO]]:
    """A terminal of 60 columns, and the file that writes to it."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with os.fdopen(slave, "w", buffering=1, encoding="utf-8") as file:
        yield master, file
    os.close(master)


def written(opened: tuple[int, TextIO]) -> str:
    """What reached the terminal, up to a mark behind it: the system hands it on bit by bit."""
    master, file = opened
    os.write(file.fileno(), b"\0")
    found = b""
    while not found.endswith(b"\0"):
        found += os.read(master, 65536)
    return found[:-1].decode().replace("\r\n", "\n")


def test_stays_below_a_partial_line(opened: tuple[int, TextIO]) -> None:
    """Dots leave it where it is; what would reach it removes it first."""
    _, file = opened
    below = LineBelow(file, clock=lambda: 0.0)
    assert below.install()
    below.show("a line")
    assert written(opened) == f"{DRAW}a line{RESTORE}"
    below.show("a line")
    file.write("\x1b[32m.\x1b[0m")
    file.flush()
    assert written(opened) == "\x1b[32m.\x1b[0m"
    file.write("\nnext")
    file.flush()
    assert written(opened) == f"{REMOVE}\nnext"
    below.show("x" * 100)
    assert written(opened) == f"{DRAW}{'x' * 59}{RESTORE}"
    file.write("y" * 55)
    file.flush()
    assert written(opened) == f"{'y' * 55}"
    file.write("z")
    file.flush()
    assert written(opened).startswith(REMOVE)
    below.remove()
    below.remove()
    assert "write" not in vars(file)


def test_below_what_is_held_in_the_buffer(opened: tuple[int, TextIO]) -> None:
    """Text without a line break that goes on in the next row is written before the line is."""
    _, file = opened
    below = LineBelow(file)
    below.install()
    file.write("y" * 80)
    below.show("a line")
    assert written(opened) == f"{'y' * 80}{DRAW}a line{RESTORE}"
    below.remove()


def test_not_where_a_break_is_held_back(opened: tuple[int, TextIO]) -> None:
    """A full row, and an end in an unknown column: nothing is drawn."""
    _, file = opened
    below = LineBelow(file)
    below.install()
    for text in ("x" * 60, "\n\x1b[2K", "\n\t"):
        file.write(text)
        file.flush()
        written(opened)
        below.show("a line")
        assert written(opened) == ""
    below.remove()


def test_a_file_that_does_not_allow_it() -> None:
    """One that buffers whole blocks, or that takes no attribute."""
    with open(os.devnull, "w") as file:
        assert not LineBelow(file).install()
    odd: Any = SimpleNamespace(line_buffering=True, isatty=lambda: True, write=len)
    assert LineBelow(odd).install()


def test_without_the_private_name() -> None:
    """Another reporter, a writer without a file, a file that is closed: no line."""
    reporter = object.__new__(TerminalReporter)

    def config(reporter: object, **writer: object) -> Any:
        return SimpleNamespace(
            pluginmanager=SimpleNamespace(
                get_plugin=lambda _name: reporter, hasplugin=lambda name: name == "x"
            ),
            get_terminal_writer=lambda: SimpleNamespace(**writer),
            option=SimpleNamespace(),
        )

    assert reporter_file(config(object(), _file=sys.stdout)) is None
    assert reporter_file(config(reporter)) is None
    with open(os.devnull) as closed:
        pass
    assert reporter_file(config(reporter, _file=closed)) is None
    assert not shows_progress(config(reporter))
    assert not captures_output(config(reporter))


def test_terminals_and_widths() -> None:
    assert is_drawable({"TERM": "xterm"})
    assert not any(is_drawable({"TERM": term}) for term in ("dumb", "", "unknown"))
    assert cut("日本語", 5) == "日本"
