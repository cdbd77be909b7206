"""Sampler: readings of the devices with a time limit, and the samples of a run.

Readings come from one thread, however many threads ask. Samples are kept in bounded memory for
a run of any length: when the rows are many, older ones are thinned. Of each stretch of time the
row with the most VRAM in use stays, and so does every row that holds the peak of a column.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage, Statement
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.vendors import DeviceReader

READ_TIMEOUT = 1.0
"""Seconds that a caller waits for a reading. After one time-out nobody waits until the driver
has answered."""

MEMORY_AGE, PROCESSES_AGE = 0.05, 1.0
"""Seconds for which a reading counts as fresh."""

T = TypeVar("T")


class Reading(Generic[T]):
    """The answer to one question to the driver, with its time."""

    def __init__(self, devices: Mapping[str, T], at: float) -> None:
        self.devices = devices
        """UUID -> figure; empty before the first reading."""
        self.at = at
        """On the monotonic clock; minus infinity before the first reading."""


class Live(Protocol):
    """Readings of devices during a run, such as `LiveVram`."""

    @property
    def is_answering(self) -> bool:
        """Whether the readings are as fresh as they can be."""

    def memory(self, max_age: float = ...) -> Reading[Memory]:
        """VRAM by device."""

    def processes(self, max_age: float = ...) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device."""


class _Query(Generic[T]):
    """One kind of reading: how it is read, and the last one."""

    def __init__(self, read: Callable[[], Mapping[str, T]]) -> None:
        self.read = read
        self.last: Reading[T] = Reading({}, float("-inf"))
        self.is_wanted = False
        self.began = float("-inf")
        """When the reading that is under way began."""


class LiveVram:
    """The memory and the processes of all devices, as fresh as a caller asks for.

    A driver that hangs, or is slow in each call, delays a run once: after the first time-out
    `is_answering` is False and callers get the last reading at once, until a reading takes less
    than the time limit again.
    """

    def __init__(
        self,
        reader: DeviceReader,
        clock: Callable[[], float] = time.monotonic,
        *,
        timeout: float | None = None,
    ) -> None:
        """`timeout`: seconds that a caller waits for a reading; None: `READ_TIMEOUT`."""
        self._clock = clock
        self._timeout = READ_TIMEOUT if timeout is None else timeout
        self._memory = _Query(reader.memory)
        self._processes = _Query(reader.processes)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._has_timed_out = False

    @property
    def is_answering(self) -> bool:
        """Whether the driver answers in time; while it does not, readings are stale."""
        return not self._has_timed_out

    def memory(self, max_age: float = MEMORY_AGE) -> Reading[Memory]:
        """Memory by device, at most `max_age` seconds old unless the driver is slow."""
        return self._fresh(self._memory, max_age)

    def processes(self, max_age: float = PROCESSES_AGE) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device, at most `max_age` seconds old unless the driver is slow."""
        return self._fresh(self._processes, max_age)

    def close(self) -> None:
        """End the readings; harmless when called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _fresh(self, query: _Query[T], max_age: float) -> Reading[T]:
        with self._changed:
            oldest = self._clock() - max_age
            if query.last.at >= oldest or self._is_closed:
                return query.last
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="gpu-share-live", daemon=True
                )
                self._thread.start()
            # A reading that is under way serves all callers that accept its age.
            if query.began < oldest:
                query.is_wanted = True
                self._changed.notify_all()
            if not self._has_timed_out:
                in_time = self._changed.wait_for(
                    lambda: query.last.at >= oldest or self._is_closed or self._has_timed_out,
                    self._timeout,
                )
                if not in_time:
                    self._has_timed_out = True
                    self._changed.notify_all()
            return query.last

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._next() is not None)
                query = self._next()
                if self._is_closed or query is None:
                    return
                query.is_wanted, query.began = False, self._clock()
            # Read without the lock: callers that accept an older reading must not wait.
            start = time.monotonic()
            try:
                devices = query.read()
            except Exception:
                # An empty answer; whoever asked goes on with what it knows.
                devices = {}
            with self._changed:
                query.last = Reading(devices, query.began)
                self._has_timed_out &= time.monotonic() - start >= self._timeout
                self._changed.notify_all()

    def _next(self) -> _Query[Any] | None:
        queries: tuple[_Query[Any], ...] = (self._memory, self._processes)
        return next((query for query in queries if query.is_wanted), None)


def read_usage(
    live: Live,
    attribution: Attribution,
    workers: Mapping[int, str],
    statements: Sequence[Statement] = (),
    *,
    memory_age: float = MEMORY_AGE,
    processes_age: float = PROCESSES_AGE,
) -> dict[str, DeviceUsage]:
    """UUID -> who holds the VRAM of a device now; a device that cannot be read is left out.

    `workers`: PID -> id. The ages are in seconds, see `LiveVram`.
    """
    processes = live.processes(processes_age).devices
    memory = live.memory(memory_age).devices
    splits = {uuid: attribution.split(found, workers) for uuid, found in processes.items()}
    return attribution.usage(memory, splits, statements)


MOST_ROWS = 20_000
"""An hour at 5 Hz in full; a day with a row every five seconds or so. 8 bytes a figure."""

RECENT_ROWS = 3_000
"""The newest rows, which are never thinned: ten minutes."""

_UNKNOWN = -1
"""Stands for None in the arrays."""


class Series:
    """The rows of one device: when, how much is in use, and its owners; None where unknown."""

    def __init__(self, most: int = MOST_ROWS, recent: int = RECENT_ROWS) -> None:
        self._most, self._recent = most, recent
        self._gap = 0.25
        self.at = array("d")
        self.used = array("q")
        self._others = array("q")
        self._owners: dict[tuple[str, str], array[int]] = {}
        """(`worker` or `neighbour`, its name) -> bytes."""

    def __len__(self) -> int:
        return len(self.at)

    def add(self, at: float, usage: DeviceUsage) -> None:
        """Append a row; `at` in seconds since the run started, later than the last."""
        if len(self.at) >= self._most:
            self._thin()
        sizes = {("neighbour", name): size for name, size in usage.neighbours.items()}
        sizes |= {("worker", name): size for name, size in (usage.workers or {}).items()}
        for owner in sizes:
            if owner not in self._owners:
                # Before its first figure nothing was known of it.
                self._owners[owner] = array("q", [_UNKNOWN]) * len(self.at)
        # An owner without a figure holds nothing where every process has its owner.
        missing = _UNKNOWN if usage.workers is None else 0
        for owner, column in self._owners.items():
            column.append(sizes.get(owner, missing))
        self.at.append(at)
        self.used.append(usage.used)
        self._others.append(_UNKNOWN if usage.others is None else usage.others)

    def neighbour(self, name: str) -> list[int | None]:
        """Bytes that a neighbour held, row by row."""
        column = self._owners.get(("neighbour", name))
        if column is None:
            return [None if others == _UNKNOWN else 0 for others in self._others]
        return _known(column)

    def neighbours(self) -> dict[str, list[int | None]]:
        """Name -> the bytes of each neighbour that held anything, row by row."""
        return {name: _known(c) for (kind, name), c in self._owners.items() if kind == "neighbour"}

    def others(self) -> list[int | None]:
        """Bytes that other processes held, row by row."""
        return _known(self._others)

    def workers(self) -> dict[str, list[int | None]]:
        """Worker's id -> the bytes that it and its descendants held, row by row."""
        return {name: _known(c) for (kind, name), c in self._owners.items() if kind == "worker"}

    def heights(self, columns: int) -> list[int]:
        """The most bytes in use in each of so many equal stretches of time; gaps are filled."""
        if not self.at or columns < 1:
            return []
        start = self.at[0]
        length = max(self.at[-1] - start, 1e-9) / columns
        heights: list[int] = [_UNKNOWN] * columns
        for at, used in zip(self.at, self.used, strict=True):
            column = min(columns - 1, int((at - start) / length))
            heights[column] = max(heights[column], used)
        last = self.used[0]
        for column, height in enumerate(heights):
            last = heights[column] = last if height == _UNKNOWN else height
        return heights

    def _thin(self) -> None:
        old = max(0, len(self.at) - self._recent)
        columns = (self.used, self._others, *self._owners.values())
        peaks = {max(range(len(column)), key=column.__getitem__) for column in columns}
        kept = self._spaced(old) | peaks
        # Not by one row each time: the next thinning is to be far away.
        while len(kept) > max(len(peaks) + 1, (self._most - self._recent) // 2):
            self._gap *= 2
            kept = self._spaced(old) | peaks
        rows = sorted({row for row in kept if row < old}) + list(range(old, len(self.at)))
        self.at = array("d", [self.at[row] for row in rows])
        self.used, self._others = _picked(self.used, rows), _picked(self._others, rows)
        self._owners = {owner: _picked(column, rows) for owner, column in self._owners.items()}

    def _spaced(self, old: int) -> set[int]:
        """Of the first `old` rows the highest of each stretch of `_gap` seconds."""
        kept: dict[int, int] = {}
        for row in range(old):
            stretch = int(self.at[row] / self._gap)
            best = kept.get(stretch)
            if best is None or self.used[row] > self.used[best]:
                kept[stretch] = row
        return set(kept.values())


def _known(column: Sequence[int]) -> list[int | None]:
    return [None if value == _UNKNOWN else value for value in column]


def _picked(column: array[int], rows: Sequence[int]) -> array[int]:
    return array("q", [column[row] for row in rows])


class DevicePeaks(NamedTuple):
    """The most VRAM that was seen in use on one device during a run, in bytes.

    Memory is sampled five times a second, process lists once, so every figure is a lower bound;
    `counted` adds what the workers themselves know.
    """

    used: int | None = None
    """In use at one moment, counting every process; None before the first sample."""
    workers: int | None = None
    """By the processes of all workers together, in one process list; None where the driver does
    not attribute processes."""
    rise: int = 0
    """What was in use at one moment beyond what neighbours and other processes explain. The
    tests held so much of it as the workers are known to have held; the rest is unattributed.
    Printed figures of the tests must not be smaller than this."""
    missed: int | None = None
    """What the tests may have held beyond that between two samples; None where nobody knows."""
    missed_used: int | None = None
    """The same of `used`: what the workers know of themselves does not show what others held
    beside them."""

    def counted(self, least: int, most: int | None) -> DevicePeaks:
        """The same where one worker is known, by itself, to have held `least` bytes, and all of
        them together to have held no more than `most`; None where that is unknown."""
        peaks = self
        if self.workers and least > self.workers:
            rise, used = max(self.rise, least), max(self.used or 0, least)
            peaks = self._replace(workers=least, rise=rise, used=used)
        if most is None:
            return peaks._replace(missed=None, missed_used=None)
        return peaks._replace(
            missed=max(0, most - peaks.rise), missed_used=max(0, most - self.rise)
        )

    @property
    def unattributed(self) -> int:
        """The part of the rise that no process list attributes to a worker."""
        return max(0, self.rise - (self.workers or 0))

    @property
    def is_unattributed(self) -> bool:
        """Whether more than 5 % of the rise is unattributed."""
        return 20 * self.unattributed > self.rise

    @property
    def is_used_exact(self) -> bool:
        """Whether no more than 5 % beyond `used` can have been in use between two samples."""
        missed = self.missed_used
        return missed is not None and 20 * missed <= (self.used or 0)

    @property
    def is_rise_exact(self) -> bool:
        """The same of the tests' part."""
        missed = self.missed
        return missed is not None and 20 * missed <= self.rise and not self.is_unattributed


class DeviceSamples:
    """The samples of one device over a run, and their peaks."""

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.series = Series(most_rows)
        self.peaks = DevicePeaks()
        self.last: DeviceUsage | None = None
        """The newest sample."""
        self._listed: list[DeviceUsage] = []
        """The usage at the last two process lists: VRAM of a process that was in the one before
        may come back after the last."""
        self._pending: list[DeviceUsage] = []
        """The samples since then: the next list may explain them."""

    def add(self, at: float, usage: DeviceUsage) -> None:
        """Keep a sample of the memory; `at` in seconds since the run started."""
        self.series.add(at, usage)
        self.last = usage
        if usage.used > (self.peaks.used or 0) or self.peaks.used is None:
            self.peaks = self.peaks._replace(used=usage.used)
        self._pending.append(usage)
        if len(self._pending) > _MOST_PENDING:
            self._pending = [max(self._pending, key=lambda sample: sample.unattributed)]

    def listed(self, usage: DeviceUsage | None = None) -> None:
        """A process list was read, or none will be: the samples since the last one are settled.

        What a neighbour or another process held in these lists explains that much of the samples
        between them.
        """
        lists = [*self._listed, *([] if usage is None else [usage])]
        neighbours = max((sum(each.neighbours.values()) for each in lists), default=0)
        foreign = max((_foreign(each) for each in lists), default=0)
        for sample in self._pending:
            rise = sample.used - max(neighbours, sum(sample.neighbours.values()))
            rise -= max(foreign, _foreign(sample))
            if rise > self.peaks.rise:
                self.peaks = self.peaks._replace(rise=rise)
        self._pending = []
        self._listed = lists[-2:] if usage is not None else []
        if usage is not None and usage.tests is not None:
            workers = max(usage.tests, self.peaks.workers or 0)
            rise = max(workers, self.peaks.rise)
            self.peaks = self.peaks._replace(workers=workers, rise=rise)

    def without_tests(self) -> None:
        """No test runs: the samples since the last list say nothing of tests."""
        self._pending, self._listed = [], []


_MOST_PENDING = 1000


def _foreign(usage: DeviceUsage) -> int:
    """Bytes that other processes explain."""
    # Workers give VRAM back between the process list and the memory: the difference is too small.
    seen = usage.net_of_neighbours - (usage.tests or 0) - usage.unattributed
    return max(0, usage.explained, seen)
