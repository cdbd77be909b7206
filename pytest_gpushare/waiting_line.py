"""The line on standard error that says what a session waits for."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable

LOG_INTERVAL = 60.0
"""Seconds between two lines of one that waits and writes to a log."""


class WaitingLine:
    """Says on standard error that the session waits: one line that changes, or a line a minute."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._clock = clock
        self._width = 0
        self._has_hinted = False
        self._next = float("-inf")

    def show(self, text: str, hint: str = "") -> None:
        """What is waited for; `text` is one line, cut to the width of a terminal.

        `hint` is shown once, in a line of its own.
        """
        if self._stream is None:
            return
        if hint and not self._has_hinted:
            self._has_hinted = True
            hint = f"{hint}\n"
        else:
            hint = ""
        with contextlib.suppress(OSError, ValueError):
            if self._is_terminal:
                # A longer one would begin a new line each time.
                text = text[: max(20, shutil.get_terminal_size().columns - 1)]
                self._stream.write(f"\r{hint}{text.ljust(self._width)}")
                self._width = len(text)
            elif self._clock() >= self._next:
                self._stream.write(f"{text}\n{hint}")
                self._next = self._clock() + LOG_INTERVAL
            self._stream.flush()

    def progress(self, text: str) -> None:
        """What is going on, on a terminal alone: a log would keep all of it."""
        if self._is_terminal:
            WaitingLine.show(self, f"gpu-share: {text}")

    def clear(self) -> None:
        """Leave the line of a terminal empty."""
        if self._stream is not None and self._width:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(f"\r{' ' * self._width}\r")
                self._stream.flush()
