"""VRAM while the run lasts: one reader of NVML, however many ask.

A driver may hang, and its process lists cost milliseconds under a lock that all its users
share. So one daemon thread reads, what it read is kept for a while, and nobody waits for it
for longer than a limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from pytest_gpushare.probe.facts import GpuProcess, Memory
from pytest_gpushare.quick import dataclass

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


@dataclass(frozen=True)
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
