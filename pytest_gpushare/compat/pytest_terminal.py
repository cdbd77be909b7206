"""The terminal under pytest's reporter: one line kept below the output, and never inside it.

pytest's row of dots is a partial line, so what belongs below it is drawn there with the cursor
put back, and is removed before anything is written that would reach it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from pytest_gpushare.text import width_of

if TYPE_CHECKING:
    import pytest

LEAST_COLUMNS, _LEAST_ROWS = 40, 4
_AGAIN = 0.05
"""Seconds below which a line that output has displaced is left to the next `show`."""
_LOCK_TIMEOUT = 2.0

# Relative to the cursor, wherever it is: what other processes wrote cannot be known. IND scrolls
# where the cursor is in the last row, and keeps its column; so there always is a row below, and
# the cursor's own row is never cleared.
DRAW, RESTORE = "\x1bD\x1b[A\x1b7\x1b[B\r\x1b[J", "\x1b8"
"""What is written before the line and after it; with no line in between it is removed."""

_STYLE = re.compile(r"\x1b\[[0-9;]*m|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
"""Sequences that do not move the cursor: colours and titles."""


_ADDS_LINES = "pytest_instafail"
"""A plugin whose reporter writes more lines, in the way of pytest's own."""


def reporter_file(config: pytest.Config) -> TextIO | None:
    """The file of pytest's own reporter, where that is a terminal.

    Uses `TerminalWriter._file` (pytest 5.4), and the module of the reporter's class, which is not
    public in pytest 8.0. None without them, and where another plugin has put a reporter that moves
    the cursor in the place of pytest's, as pytest-sugar does: no line is drawn then.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if type(reporter).__module__ not in ("_pytest.terminal", _ADDS_LINES):
        return None
    file = getattr(config.get_terminal_writer(), "_file", None)
    try:
        return file if file is not None and file.isatty() else None
    except ValueError:
        # It is closed.
        return None


def shows_progress(config: pytest.Config) -> bool:
    """Whether pytest shows its progress in the terminal's title or tab.

    Uses the name under which that plugin is registered (pytest 9). False without it.
    """
    return bool(config.pluginmanager.hasplugin("terminalprogress-plugin"))


def captures_output(config: pytest.Config) -> bool:
    """Whether the output of tests is captured: not with `-s` and `-p no:capture`.

    Uses the name under which the option is stored (pytest 2). False without it.
    """
    return getattr(config.option, "capture", "no") != "no"


class LineBelow:
    """One line below the output of a terminal.

    Whatever is written to the file, or to standard error where that is the same terminal, goes
    through one lock with the line: by the reporter, by `print`, and by other plugins. What other
    processes write cannot be seen here; it may leave a part of the line in view.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._lock = threading.RLock()
        self._hooked: list[TextIO] = []
        self._line = ""
        self._is_shown = False
        self._shown_at = float("-inf")
        self._shown_in: tuple[int, int] | None = None
        """The size of the terminal then: one that gets lower may drop the row of the line."""
        self._column: int | None = 0
        """Columns that the output's last line takes; None where that is unknown."""

    def install(self) -> bool:
        """See what is written from now on. False: this file does not allow it."""
        file = self._file
        # Else text with a line break may be in a buffer when the line is drawn.
        if not (getattr(file, "line_buffering", False) or getattr(file, "write_through", False)):
            return False
        files = [file]
        with contextlib.suppress(ValueError, AttributeError):
            if sys.stderr is not file and sys.stderr.isatty():
                files.append(sys.stderr)
        try:
            for each in files:
                vars(each)["write"] = self._hook(each.write)
                self._hooked.append(each)
        except TypeError:
            self.remove()
            return False
        return True

    def remove(self) -> None:
        """Take the line away, and see no more of what is written; harmless when called twice."""
        with self._alone():
            self._erase()
            for file in self._hooked:
                vars(file).pop("write", None)
            self._hooked = []

    def show(self, line: str) -> None:
        """Draw the line, or draw it again; not where the output's end is no place for it."""
        with self._alone():
            is_there = self._is_shown and line == self._line and self._shown_in == self._size()
            if self._hooked and not is_there:
                self._line = line
                self._draw()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Under the lock. After `_LOCK_TIMEOUT` without it: a forked child may never get it."""
        has_lock = self._lock.acquire(timeout=_LOCK_TIMEOUT)
        try:
            yield
        finally:
            if has_lock:
                self._lock.release()

    def _hook(self, original: Callable[[str], int]) -> Callable[[str], int]:
        def write(text: str) -> int:
            with self._alone():
                displaced = self._is_shown and not self._stays(text)
                if displaced:
                    self._erase()
                written = original(text)
                self._follow(text)
                if displaced and self._clock() - self._shown_at >= _AGAIN:
                    self._draw()
                return written

        return write

    def _stays(self, text: str) -> bool:
        """Whether a text leaves the cursor in its row."""
        visible = _STYLE.sub("", text)
        size = self._size()
        if size is None or self._column is None or not visible.isprintable():
            return False
        return self._column % size[0] + width_of(visible) < size[0]

    def _follow(self, text: str) -> None:
        _, newline, rest = text.rpartition("\n")
        if newline:
            self._column = 0
        visible = _STYLE.sub("", rest)
        if "\r" in visible:
            self._column, visible = 0, visible.rpartition("\r")[2]
        if not visible.isprintable():
            self._column = None
        if self._column is not None:
            self._column += width_of(visible)

    def _draw(self) -> None:
        size = self._size()
        if size is None or size[0] < LEAST_COLUMNS or size[1] < _LEAST_ROWS:
            self._erase()
            return
        # In the last column the terminal holds back a line break that must not get lost.
        if self._column is None or (self._column and self._column % size[0] == 0):
            return
        # Text in the buffer that goes on in the next row would be written into the line.
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()
        self._is_shown, self._shown_at, self._shown_in = True, self._clock(), size
        self._put(cut(self._line, size[0] - 1))

    def _erase(self) -> None:
        if self._is_shown:
            self._put("")
            # Not before: an interrupt in between erases twice, which harms nothing.
            self._is_shown = False

    def _put(self, line: str) -> None:
        """Write past the file's buffer: what is held there may come after other output."""
        encoding = self._file.encoding or "ascii"
        with contextlib.suppress(OSError, ValueError):
            os.write(self._file.fileno(), f"{DRAW}{line}{RESTORE}".encode(encoding, "replace"))

    def _size(self) -> tuple[int, int] | None:
        try:
            size = os.get_terminal_size(self._file.fileno())
        except (OSError, ValueError):
            return None
        return (size.columns, size.lines) if size.columns > 0 else None


def cut(line: str, columns: int) -> str:
    """The line in so many columns."""
    while width_of(line) > columns:
        line = line[:-1]
    return line


def is_drawable(environment: Mapping[str, str]) -> bool:
    """Whether the terminal obeys the codes that move the cursor."""
    return environment.get("TERM", "") not in ("", "dumb", "unknown") or sys.platform == "win32"
