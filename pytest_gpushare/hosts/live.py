"""Readings of another host's devices, as far as it has sent them: nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from pytest_gpushare.gpu.attribution import (
    Attribution,
    DeviceUsage,
    ProcessSplit,
    Statement,
)
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.sampler import MEMORY_AGE, PROCESSES_AGE, Live, Reading
from pytest_gpushare.hosts.answers import ProcessRow, decode_sample

_SHIFT = 32
_FRESH = 3.0
"""Seconds after which readings of a host that sends none any more are stale."""
_SOONEST = 0.05
"""Seconds between two requests for a sample."""


def global_pid(host: int, pid: int) -> int:
    """A number for a process that no process of another host has; this host is 0."""
    return (host << _SHIFT) + pid


class HostLive:
    """The last readings of one host, by the names that its devices have in this run."""

    def __init__(
        self,
        number: int,
        ask: Callable[[], object],
        keys: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` requests a sample; `keys`: the host's UUID -> the device's name in this run."""
        self._number, self._ask, self._keys, self._clock = number, ask, keys, clock
        self._memory: Reading[Memory] = Reading({}, float("-inf"))
        self._processes: Reading[tuple[GpuProcess, ...] | None] = Reading({}, float("-inf"))
        self._parents: dict[int, int] = {}
        self._alive: set[int] = set()
        self._offset = float("inf")
        """What is added to a time of the host's clock; the least that was seen is the best."""
        self._answering = False
        self._asked_at = float("-inf")
        self._lock = threading.Lock()

    def take(self, message: Mapping[str, Any]) -> None:
        """A sample has arrived. Raises `ValueError` for one that makes no sense."""
        sample = decode_sample(message)
        now = self._clock()
        with self._lock:
            self._offset = min(self._offset, now - sample.now)
            self._answering = sample.is_answering
            if sample.memory_at is not None:
                at = min(now, sample.memory_at + self._offset)
                found = {self._keys[u]: m for u, m in sample.memory.items() if u in self._keys}
                self._memory = Reading(found, max(at, self._memory.at))
            if sample.processes_at is not None:
                at = min(now, sample.processes_at + self._offset)
                rows = {self._keys[u]: r for u, r in sample.processes.items() if u in self._keys}
                self._learn(row for found in rows.values() for row in found or ())
                self._processes = Reading(
                    {
                        uuid: None if found is None else tuple(self._named(row) for row in found)
                        for uuid, found in rows.items()
                    },
                    max(at, self._processes.at),
                )

    def _named(self, row: ProcessRow) -> GpuProcess:
        return row.process._replace(pid=global_pid(self._number, row.process.pid))

    def _learn(self, rows: Any) -> None:
        self._parents, self._alive = {}, set()
        for row in rows:
            line = [global_pid(self._number, pid) for pid in (row.process.pid, *row.ancestors)]
            self._parents.update(pairwise(line))
            if row.alive:
                self._alive.add(line[0])

    @property
    def is_answering(self) -> bool:
        """Whether what is known is of the last seconds."""
        return self._answering and self._clock() - self._memory.at < _FRESH

    def memory(self, max_age: float = MEMORY_AGE) -> Reading[Memory]:
        """The last reading; where it is older, a newer one is asked for."""
        self._refresh(self._memory, max_age)
        return self._memory

    def processes(self, max_age: float = PROCESSES_AGE) -> Reading[tuple[GpuProcess, ...] | None]:
        """The last reading; where it is older, a newer one is asked for."""
        self._refresh(self._processes, max_age)
        return self._processes

    def _refresh(self, last: Reading[Any], max_age: float) -> None:
        now = self._clock()
        if now - last.at > max_age and now - self._asked_at > _SOONEST:
            self._asked_at = now
            self._ask()

    def parent(self, pid: int) -> int | None:
        """The parent of a process in the last list."""
        return self._parents.get(pid)

    def alive(self, pid: int) -> bool:
        """Whether a process in the last list is visible on its host."""
        return pid in self._alive


class LivePart(Protocol):
    """One host of the run, as readings need it."""

    live: Live | None
    attribution: Attribution


class AllLive:
    """The readings of all hosts together; the oldest of them says how old they are."""

    def __init__(self, parts: Sequence[LivePart]) -> None:
        self._lives = [part.live for part in parts if part.live is not None]

    @property
    def is_answering(self) -> bool:
        """Whether all do."""
        return all(live.is_answering for live in self._lives)

    def memory(self, max_age: float = MEMORY_AGE) -> Reading[Memory]:
        """VRAM by device."""
        found = [live.memory(max_age) for live in self._lives]
        devices = {uuid: memory for reading in found for uuid, memory in reading.devices.items()}
        return Reading(devices, min((reading.at for reading in found), default=float("-inf")))

    def processes(self, max_age: float = PROCESSES_AGE) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device."""
        found = [live.processes(max_age) for live in self._lives]
        devices = {uuid: listed for reading in found for uuid, listed in reading.devices.items()}
        return Reading(devices, min((reading.at for reading in found), default=float("-inf")))


class AllAttribution(Attribution):
    """The attributions of all hosts together: each device's is its host's."""

    def __init__(self, parts: Sequence[tuple[frozenset[str], Attribution]]) -> None:
        """`parts`: for each host the names of its devices, and its attribution."""
        self._parts = parts
        super().__init__()
        self.start = {uuid: usage for _, each in parts for uuid, usage in each.start.items()}

    def usage(
        self,
        memory: Mapping[str, Memory],
        splits: Mapping[str, ProcessSplit | None],
        statements: Sequence[Statement] = (),
    ) -> dict[str, DeviceUsage]:
        """See `Attribution`; the statements are those of this host's neighbours."""
        found: dict[str, DeviceUsage] = {}
        for number, (devices, attribution) in enumerate(self._parts):
            part = {uuid: now for uuid, now in memory.items() if uuid in devices}
            found.update(attribution.usage(part, splits, () if number else statements))
        return found

    def split(
        self, processes: Sequence[GpuProcess] | None, workers: Mapping[int, str]
    ) -> ProcessSplit | None:
        """See `Attribution`; a list is of one host."""
        host = processes[0].pid >> _SHIFT if processes else 0
        return self._parts[min(host, len(self._parts) - 1)][1].split(processes, workers)
