"""Samples of one device over a run of any length, in bounded memory.

When the rows are many, older ones are thinned: of each stretch of time the row with the most
VRAM in use stays, and so does every row that holds the peak of a column. So a picture of the
run keeps its shape, and its peaks are exact.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pytest_gpushare.gpu.devices import GpuProcess, Memory

PATIENCE = 2.0
"""Seconds for which anybody waits for NVML; then the last reading has to do."""

MEMORY_AGE, PROCESSES_AGE = 0.05, 1.0
"""Seconds for which a reading counts as fresh."""

T = TypeVar("T")


class Reader(Protocol):
    """What reads devices: `probe.nvml.Nvml`, once it is open."""

    def memory(self) -> dict[str, Memory]:
        """UUID -> VRAM now; a device that cannot be read is left out."""

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        """UUID -> who holds VRAM there; None where the driver does not tell."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What was read, and when."""

    devices: Mapping[str, T]
    """UUID -> what was read; empty before the first reading."""
    at: float
    """On the monotonic clock; minus infinity before the first reading."""


class _Kept(Generic[T]):
    """One kind of reading: how it is read, and the last one."""

    def __init__(self, read: Callable[[], Mapping[str, T]]) -> None:
        self.read = read
        self.last: Reading[T] = Reading({}, float("-inf"))
        self.wanted = False
        self.begun = float("-inf")
        """When the reading that is under way began."""


class LiveVram:
    """The VRAM of all devices and who holds it, as fresh as asked for."""

    def __init__(self, reader: Reader, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._memory = _Kept(reader.memory)
        self._processes = _Kept(reader.processes)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def memory(self, max_age: float = MEMORY_AGE) -> Reading[Memory]:
        """VRAM by device, at most `max_age` seconds old unless NVML is slow."""
        return self._fresh(self._memory, max_age)

    def processes(self, max_age: float = PROCESSES_AGE) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device, at most `max_age` seconds old unless NVML is slow."""
        return self._fresh(self._processes, max_age)

    def close(self) -> None:
        """Read nothing more; harmless when called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fresh(self, kept: _Kept[T], max_age: float) -> Reading[T]:
        with self._changed:
            oldest = self._clock() - max_age
            if kept.last.at >= oldest or self._closed:
                return kept.last
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="gpu-share-live", daemon=True
                )
                self._thread.start()
            # A reading that is under way serves all who find it fresh enough.
            if kept.begun < oldest:
                kept.wanted = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: kept.last.at >= oldest or self._closed, PATIENCE)
            return kept.last

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                kept = self._next()
                if self._closed or kept is None:
                    return
                kept.wanted, kept.begun = False, self._clock()
            # Read without the lock: who is content with an older reading must not wait.
            try:
                devices = kept.read()
            except Exception:
                # An answer that says nothing; whoever asked goes on with what it knows.
                devices = {}
            with self._changed:
                kept.last = Reading(devices, kept.begun)
                self._changed.notify_all()

    def _next(self) -> _Kept[Any] | None:
        kinds: tuple[_Kept[Any], ...] = (self._memory, self._processes)
        return next((kept for kept in kinds if kept.wanted), None)


MOST_ROWS = 20_000
"""An hour at 5 Hz in full; a day with a row every five seconds or so. 8 bytes a figure."""

RECENT_ROWS = 3_000
"""The newest rows, which are never thinned: ten minutes."""

_UNKNOWN = -1
"""Stands for None in the arrays."""


class Parts(NamedTuple):
    """Who holds the VRAM that is in use, in bytes; None where nobody can tell."""

    ollama: int | None = None
    others: int | None = None
    workers: Mapping[str, int] | None = None
    """By worker's id; a worker that holds nothing may be left out."""


class Series:
    """The rows of one device: when, how much is in use, and by whom."""

    def __init__(self, most: int = MOST_ROWS, recent: int = RECENT_ROWS) -> None:
        self._most, self._recent = most, recent
        self._gap = 0.25
        self.at = array("d")
        self.used = array("q")
        self._ollama = array("q")
        self._others = array("q")
        self._workers: dict[str, array[int]] = {}

    def __len__(self) -> int:
        return len(self.at)

    def add(self, at: float, used: int, parts: Parts) -> None:
        """Append a row; `at` in seconds since the run started, later than the last."""
        if len(self.at) >= self._most:
            self._thin()
        for worker in parts.workers or ():
            if worker not in self._workers:
                # Before its first figure nothing was known of it.
                self._workers[worker] = array("q", [_UNKNOWN]) * len(self.at)
        self.at.append(at)
        self.used.append(used)
        self._ollama.append(_UNKNOWN if parts.ollama is None else parts.ollama)
        self._others.append(_UNKNOWN if parts.others is None else parts.others)
        for worker, column in self._workers.items():
            column.append(_UNKNOWN if parts.workers is None else parts.workers.get(worker, 0))

    def ollama(self) -> list[int | None]:
        """Bytes that Ollama held, row by row."""
        return _told(self._ollama)

    def others(self) -> list[int | None]:
        """Bytes that neither Ollama nor a worker held, row by row."""
        return _told(self._others)

    def workers(self) -> dict[str, list[int | None]]:
        """Worker's id -> the bytes that it and its descendants held, row by row."""
        return {worker: _told(column) for worker, column in self._workers.items()}

    def heights(self, columns: int) -> list[int]:
        """The most bytes in use in each of so many equal stretches of time; gaps are filled."""
        if not self.at or columns < 1:
            return []
        begun = self.at[0]
        length = max(self.at[-1] - begun, 1e-9) / columns
        heights: list[int] = [_UNKNOWN] * columns
        for at, used in zip(self.at, self.used, strict=True):
            column = min(columns - 1, int((at - begun) / length))
            heights[column] = max(heights[column], used)
        last = self.used[0]
        for column, height in enumerate(heights):
            last = heights[column] = last if height == _UNKNOWN else height
        return heights

    def _thin(self) -> None:
        old = max(0, len(self.at) - self._recent)
        peaks = {_highest(column) for column in self._columns()}
        kept = self._spaced(old) | peaks
        # Not by one row each time: the next thinning is to be far away.
        while len(kept) > max(len(peaks), (self._most - self._recent) // 2):
            if self._gap > 1e9:
                break
            self._gap *= 2
            kept = self._spaced(old) | peaks
        rows = sorted({row for row in kept if row < old}) + list(range(old, len(self.at)))
        self.at = array("d", [self.at[row] for row in rows])
        self.used, self._ollama, self._others = (
            _picked(column, rows) for column in (self.used, self._ollama, self._others)
        )
        self._workers = {w: _picked(column, rows) for w, column in self._workers.items()}

    def _spaced(self, old: int) -> set[int]:
        """Of the first `old` rows the highest of each stretch of `_gap` seconds."""
        kept: dict[int, int] = {}
        for row in range(old):
            stretch = int(self.at[row] / self._gap)
            best = kept.get(stretch)
            if best is None or self.used[row] > self.used[best]:
                kept[stretch] = row
        return set(kept.values())

    def _columns(self) -> Iterator[array[int]]:
        yield self.used
        yield self._ollama
        yield self._others
        yield from self._workers.values()


def _told(column: Sequence[int]) -> list[int | None]:
    return [None if value == _UNKNOWN else value for value in column]


def _picked(column: array[int], rows: Sequence[int]) -> array[int]:
    return array("q", [column[row] for row in rows])


def _highest(column: array[int]) -> int:
    return max(range(len(column)), key=column.__getitem__)
