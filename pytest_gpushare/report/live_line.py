"""The live line: the VRAM of the fullest device while the tests run, below pytest's output.

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

from pytest_gpushare.compat.pytest_options import captures_output, reporter_file, shows_progress
from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.report.output import verbosity_of
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.text import cut, encodable, width_of
from pytest_gpushare.units import GB

if TYPE_CHECKING:
    import pytest


INTERVAL = 0.25
"""Seconds between two looks at the figures."""

_CELLS = 4
_BARS = "▁▂▃▄▅▆▇"
_STOP_TIMEOUT = 1.0


def begin(run: ActiveRun, config: pytest.Config) -> None:
    """Show the line from now on until the run's services stop, where it is wanted."""
    file = reporter_file(config)
    if run.samplers and file is not None and is_wanted(run, config):
        run.services.add(LiveLine(run, LineBelow(file)))


def is_wanted(
    run: ActiveRun, config: pytest.Config, environment: Mapping[str, str] = os.environ
) -> bool:
    """Whether the last row of this terminal is free for a line."""
    # The tests of a run without workers own the terminal as much as pytest does.
    if run.settings.live == "off" or run.plan.request.in_process:
        return False
    if verbosity_of(config) < 0 or not captures_output(config) or not is_drawable(environment):
        return False
    if run.settings.live == "on":
        return True
    on_ci = environment.get("CI") or environment.get("BUILD_NUMBER")
    return not on_ci and not shows_progress(config) and sys.platform != "win32"


class LiveLine:
    """The service that draws the line: four times a second at most, and only what has changed."""

    def __init__(self, run: ActiveRun, place: LineBelow) -> None:
        self._run, self._place = run, place
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="gpu-share-line", daemon=True)

    def start(self) -> None:
        """Draw from now on."""
        if self._place.install():
            self._thread.start()

    def stop(self) -> None:
        """Remove the line: what follows is not about running tests."""
        self._stopped.set()
        self._place.remove()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT)

    def _serve(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                text = line(self._run)
            except Exception:
                # The line is no reason to disturb a run.
                self._place.remove()
                return
            if text:
                self._place.show(text)


def line(run: ActiveRun) -> str:
    """`gpu-share: GPU 0 ▇▇▇▂ 19.5 of 24 GB · tests 7.4 · Ollama 10.1 · 212/600`; empty before
    the first reading."""
    labels = {planned.device.uuid: planned.device.label for planned in run.plan.devices}
    used = [
        (watched.last, labels.get(uuid, "GPU"))
        for uuid, watched in run.samples.items()
        if watched.last is not None and watched.last.total
    ]
    if not used:
        return ""
    fullest, label = max(used, key=lambda each: each[0].used / each[0].total)
    others = f" +{len(used) - 1}" if len(used) > 1 else ""
    parts = [
        f"gpu-share: {label} {gauge(fullest.used, fullest.total)} "
        f"{_gb(fullest.used)} of {_round(fullest.total)} GB{others}",
        *_owners(fullest),
    ]
    done, total = sum(run.tests.counts.values()), run.tests.total
    if total:
        parts.append(f"{min(done, total)}/{total}")
    return " · ".join(parts)


def _owners(usage: DeviceUsage) -> list[str]:
    parts = []
    if usage.tests is not None:
        # What nobody explains of the rise is the tests' until a process list says otherwise.
        parts.append(f"tests {_gb(usage.tests + usage.unattributed)}")
    parts += [f"{name} {_gb(size)}" for name, size in usage.neighbours.items()]
    return parts


def gauge(used: int, total: int) -> str:
    """The part in use, in eighths of each cell."""
    top = len(_BARS) - 1
    filled = min(1.0, used / max(1, total)) * _CELLS
    return "".join(_BARS[round(top * min(1.0, max(0.0, filled - cell)))] for cell in range(_CELLS))


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


def _round(size: int) -> str:
    """`24`, or `23.6` where that is no whole number."""
    return f"{size / GB:.1f}".removesuffix(".0")


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
        line = encodable(line, self._file.encoding or "ascii")
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


def is_drawable(environment: Mapping[str, str]) -> bool:
    """Whether the terminal obeys the codes that move the cursor."""
    return environment.get("TERM", "") not in ("", "dumb", "unknown") or sys.platform == "win32"
