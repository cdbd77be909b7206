"""Commands in an emulated terminal: what they wrote, and what stands on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte
from simulator.child import start_child

from pytest_gpushare.report.live_line import DRAW, RESTORE

LIVE = re.compile(f"{re.escape(DRAW)}([^\x1b]*){re.escape(RESTORE)}")
"""The live line as it is drawn; without a text where it is removed."""

Size = tuple[int, int]
"""Columns and rows."""


class Terminal:
    """A command that runs in a terminal of its own."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str | None],
        size: Size = (80, 24),
    ) -> None:
        self.size = size
        self.parts: list[Size | bytearray] = [bytearray()]
        """What was written, with the terminal's new size wherever it was changed."""
        self._master, slave = pty.openpty()
        self._set_size(size)
        without = {"COLUMNS", "LINES"}
        kept = {k: v for k, v in environment.items() if v is not None and k not in without}
        self._process = start_child(
            command,
            cwd=cwd,
            env={"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **kept},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    @property
    def written(self) -> str:
        """All that was written so far."""
        texts = [
            part.decode("utf-8", "replace") for part in self.parts if isinstance(part, bytearray)
        ]
        return "".join(texts)

    def read_until(self, condition: Callable[[str], bool] | None = None, limit: float = 60) -> str:
        """Read until the condition holds of all that was written; None: until the end."""
        until = time.monotonic() + limit
        while condition is None or not condition(self.written):
            left = until - time.monotonic()
            assert left > 0, f"not in {limit} s: {self.written[-2000:]!r}"
            if not select.select([self._master], [], [], left)[0]:
                continue
            try:
                data = os.read(self._master, 65536)
            except OSError:
                # Linux: no process has the terminal any more.
                data = b""
            if not data:
                assert condition is None, f"ended: {self.written[-2000:]!r}"
                break
            last = self.parts[-1]
            assert isinstance(last, bytearray)
            last += data
        return self.written

    def resize(self, size: Size) -> None:
        """Change the terminal's size, as a user does with the mouse."""
        self._set_size(size)
        self.size = size
        self.parts += [size, bytearray()]

    def interrupt(self) -> None:
        """Ctrl-C: to the terminal's foreground processes."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self, limit: float = 60) -> int:
        """Read to the end. Returns the exit code."""
        try:
            self.read_until(None, limit)
            return self._process.wait(limit)
        finally:
            self.close()

    def close(self) -> None:
        """End what still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        with contextlib.suppress(OSError):
            os.close(self._master)

    def _set_size(self, size: Size) -> None:
        columns, rows = size
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def run(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str | None],
    size: Size = (80, 24),
    limit: float = 60,
) -> tuple[int, Terminal]:
    """Run a command to its end. Returns its exit code and its terminal."""
    terminal = Terminal(command, cwd, environment, size)
    return terminal.end(limit), terminal


def without_live(parts: Sequence[Size | bytearray]) -> list[Size | bytearray]:
    """What was written but for the live line."""
    return [
        bytearray(LIVE.sub("", part.decode()).encode()) if isinstance(part, bytearray) else part
        for part in parts
    ]


def shown(parts: Sequence[Size | bytearray], size: Size) -> list[str]:
    """The scrollback and the screen as text, without blank rows at the end."""
    screen = pyte.HistoryScreen(*size, history=200_000, ratio=0.5)
    stream = pyte.ByteStream(screen)
    for part in parts:
        if isinstance(part, bytearray):
            stream.feed(bytes(part))
        else:
            columns, rows = part
            screen.resize(rows, columns)
    width = max([size[0], *(part[0] for part in parts if isinstance(part, tuple))])
    rows_above = ["".join(row[at].data for at in range(width)) for row in screen.history.top]
    lines = [line.rstrip() for line in [*rows_above, *screen.display]]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def live_lines(parts: Sequence[Size | bytearray]) -> list[str]:
    """The texts of the live line, in the order in which they were drawn."""
    return [
        text
        for part in parts
        if isinstance(part, bytearray)
        for text in LIVE.findall(part.decode())
        if text
    ]
