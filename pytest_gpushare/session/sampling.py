"""The watch: VRAM of the devices several times a second, and who holds it once a second.

One thread reads and keeps; nothing is written while the tests run, so no slow disk can cost a
sample. The thread is a daemon: nothing is left when pytest dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Owners, Teller
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.sampler import MOST_ROWS, RECENT_ROWS, Parts, Reading, Series
from pytest_gpushare.session.workers import Workers

INTERVAL = 0.2
"""Seconds between readings of a device's memory: 12 microseconds for the driver."""

PROCESSES_INTERVAL = 1.0
"""Seconds between readings of process lists: milliseconds, under a lock of the driver."""

_STOP_TIMEOUT = 1.0
_MOST_ROWS_OF_ALL = 60_000
"""Rows of all devices together: a machine with many of them must not need more memory."""


class Vram(Protocol):
    """What is watched: `run.live.LiveVram`."""

    def memory(self, max_age: float = ...) -> Reading[Memory]:
        """VRAM by device."""

    def processes(self, max_age: float = ...) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device."""


class DeviceSamples:
    """One device while it is watched; sizes in bytes."""

    def __init__(self, owners: Owners, most_rows: int) -> None:
        self.series = Series(most_rows)
        self.teller = Teller(owners)
        self.parts = Parts()
        self.peak_used: int | None = None
        self.peak_workers: int | None = None
        """The most that all workers held together; None where NVML does not tell."""


def rows_for(devices: int) -> int:
    """The most rows that each of so many devices keeps."""
    return min(MOST_ROWS, max(2 * RECENT_ROWS, _MOST_ROWS_OF_ALL // max(1, devices)))


class Sampler:
    """A service that samples the devices of the plan until it is stopped."""

    def __init__(
        self,
        live: Vram,
        devices: Sequence[str],
        workers: Workers,
        record: Record,
        resident: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """`resident`: UUID -> bytes of Ollama by its own word, where NVML tells nothing."""
        self._resident = resident
        self._live, self._workers, self._record, self._clock = live, workers, record, record.clock
        self._owners = Owners()
        most = rows_for(len(devices))
        self.devices = {uuid: DeviceSamples(self._owners, most) for uuid in devices}
        self.cpu_time = 0.0
        """Seconds of CPU time of the sampling thread."""
        self._last_processes = float("-inf")
        self._last_memory = float("-inf")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="gpu-share-watch", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Sample no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT)

    def last_look(self) -> None:
        """All fixtures are torn down and the workers still there: what do they hold now?"""
        begun = self._clock()
        self.sample(processes=True, workers=self._workers.not_crashed())
        for member in self._workers:
            if member.readings and member.readings[-1][0] >= self._record.since_start(begun):
                member.kept = member.readings[-1][1]

    def _run(self) -> None:
        due = self._clock()
        while not self._stopped.is_set():
            self.sample(processes=False)
            self.cpu_time = time.thread_time()
            due = max(due + INTERVAL, self._clock())
            self._stopped.wait(due - self._clock())

    def sample(self, *, processes: bool, workers: Mapping[int, str] | None = None) -> None:
        """One row for each device; process lists when they are due, or asked for."""
        workers = self._workers.at_work() if workers is None else workers
        with self._lock:
            since = self._clock() - self._last_processes
            if not workers:
                self._forget_parts()
            elif processes or since >= PROCESSES_INTERVAL:
                self._read_processes(workers)
            reading = self._live.memory(INTERVAL / 2)
            if reading.at <= self._last_memory:
                # NVML hangs: what it said before is no news.
                return
            self._last_memory = reading.at
            at = self._record.since_start(reading.at)
            for uuid, watched in self.devices.items():
                memory = reading.devices.get(uuid)
                if memory is not None:
                    watched.series.add(at, memory.used, self._parts(uuid, memory.used, watched))
                    watched.peak_used = max(memory.used, watched.peak_used or 0)

    def _read_processes(self, workers: Mapping[int, str]) -> None:
        self._last_processes = self._clock()
        before = self._live.memory(0.0).devices
        reading = self._live.processes(0.0)
        if reading.at < self._last_processes - PROCESSES_INTERVAL:
            self._forget_parts()
            return
        after = self._live.memory(0.0).devices
        at = self._record.since_start(reading.at)
        held: dict[str, int] = {}
        known = False
        for uuid, watched in self.devices.items():
            # What a process takes between two readings must not be called another's.
            used = [m.used for m in (before.get(uuid), after.get(uuid)) if m is not None]
            found = reading.devices.get(uuid) if used else None
            watched.parts = watched.teller.parts(min(used, default=0), found, workers)
            if watched.parts.workers is None:
                continue
            known = True
            for worker, size in watched.parts.workers.items():
                held[worker] = held.get(worker, 0) + size
            total = sum(watched.parts.workers.values())
            watched.peak_workers = max(total, watched.peak_workers or 0)
        if known:
            self._tell(at, held, set(workers.values()))
        self._owners.forget_all_but(
            {process.pid for found in reading.devices.values() for process in found or ()}
        )

    def _tell(self, at: float, held: Mapping[str, int], present: set[str]) -> None:
        for member in self._workers:
            # Only where the own device tells by process is 0 a figure.
            watched = self.devices.get(member.device or "")
            if watched is None or watched.parts.workers is None or member.id not in present:
                continue
            self._workers.read(member, at, held.get(member.id, 0))

    def _parts(self, uuid: str, used: int, watched: DeviceSamples) -> Parts:
        if watched.parts.ollama is not None:
            return watched.parts
        said = self._resident().get(uuid)
        return Parts(None if said is None else min(said, used))

    def _forget_parts(self) -> None:
        for watched in self.devices.values():
            watched.parts = Parts()
