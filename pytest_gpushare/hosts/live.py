"""What another host sends during the run: readings of its devices, and the answers of its Ollama.

Nobody waits for it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from pytest_gpushare.gpu.attribution import (
    Attribution,
    DeviceUsage,
    ProcessSplit,
    Statement,
)
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.readings import MEMORY_AGE, PROCESSES_AGE, Live, Reading
from pytest_gpushare.hosts.answers import ModelsAnswer, ProcessRow, Sample
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.monitor import Monitor, MonitoredServer

_SHIFT = 32
_FRESH = 3.0
"""Seconds after which readings of a host that sends none any more are stale."""
_SOONEST = 0.05
"""Seconds between two requests for a sample."""
_numbers = itertools.count(1)
T = TypeVar("T")


def global_pid(host: int, pid: int) -> int:
    """A number for a process that no process of another host has; this host is 0."""
    return (host << _SHIFT) + pid_there(pid)


def pid_there(number: int) -> int:
    """The PID that a process has on its host."""
    return number & ((1 << _SHIFT) - 1)


class HostLive:
    """The last readings of one host, by the names that its devices have in this run."""

    def __init__(
        self,
        number: int,
        say: Callable[[str], object],
        keys: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` sends the host a word; `keys`: its UUID -> the device's name in this run."""
        self._number, self._say, self._keys, self._clock = number, say, keys, clock
        self._memory: Reading[Memory] = Reading({}, float("-inf"))
        self._processes: Reading[tuple[GpuProcess, ...] | None] = Reading({}, float("-inf"))
        self._parents: dict[int, int] = {}
        self._alive: set[int] = set()
        self._offset = float("inf")
        """What is added to a time of the host's clock; the least that was seen is the best."""
        self._answering = False
        self._asked_at = float("-inf")
        self._changed = threading.Condition()

    def take(self, sample: Sample) -> None:
        """A sample has arrived."""
        now = self._clock()
        with self._changed:
            self._offset = min(self._offset, now - sample.now)
            memory = sample.memory
            self._answering = memory is not None and memory.is_answering
            if memory is not None:
                at = min(now, memory.at + self._offset)
                self._memory = Reading(self._by_key(memory.devices), max(at, self._memory.at))
            if (processes := sample.processes) is not None:
                at = min(now, processes.at + self._offset)
                rows = self._by_key(processes.devices)
                self._learn(row for found in rows.values() for row in found or ())
                self._processes = Reading(
                    {
                        key: None if found is None else tuple(self._named(row) for row in found)
                        for key, found in rows.items()
                    },
                    max(at, self._processes.at),
                )
            self._changed.notify_all()

    def _by_key(self, devices: Mapping[str, T]) -> dict[str, T]:
        return {self._keys[uuid]: each for uuid, each in devices.items() if uuid in self._keys}

    def look(self, limit: float = 1.0) -> None:
        """Have the devices and their processes read now, and wait so many seconds for it."""
        since = self._clock()
        self._say("look")
        with self._changed:
            self._changed.wait_for(lambda: min(self._memory.at, self._processes.at) >= since, limit)

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
            self._say("read")

    def parent(self, pid: int) -> int | None:
        """The parent of a process in the last list."""
        return self._parents.get(pid)

    def alive(self, pid: int) -> bool:
        """Whether a process in the last list is visible on its host."""
        return pid in self._alive


class AllLive:
    """The readings of all hosts together; the oldest of them says how old they are."""

    def __init__(self, lives: Sequence[Live]) -> None:
        self._lives = lives

    @property
    def is_answering(self) -> bool:
        """Whether all do."""
        return all(live.is_answering for live in self._lives)

    def memory(self, max_age: float = MEMORY_AGE) -> Reading[Memory]:
        """VRAM by device."""
        return _together([live.memory(max_age) for live in self._lives])

    def processes(self, max_age: float = PROCESSES_AGE) -> Reading[tuple[GpuProcess, ...] | None]:
        """Processes by device."""
        return _together([live.processes(max_age) for live in self._lives])


def _together(readings: Sequence[Reading[T]]) -> Reading[T]:
    devices = {uuid: found for reading in readings for uuid, found in reading.devices.items()}
    return Reading(devices, min(reading.at for reading in readings))


class AllAttribution(Attribution):
    """The attributions of all hosts together: each device's is its host's."""

    def __init__(self, parts: Sequence[tuple[Collection[str], Attribution]]) -> None:
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

    def keep(self, worker: str, pids: Iterable[int]) -> None:
        """See `Attribution`; a PID says of which host it is."""
        kept = tuple(pids)
        for _, attribution in self._parts:
            attribution.keep(worker, kept)

    def split(
        self, processes: Sequence[GpuProcess] | None, workers: Mapping[int, str]
    ) -> ProcessSplit | None:
        """See `Attribution`; a list is of one host."""
        host = processes[0].pid >> _SHIFT if processes else 0
        return self._parts[min(host, len(self._parts) - 1)][1].split(processes, workers)


class HostQuestion:
    """`GET /api/ps`, asked on a host; as `ollama.monitor.Question`."""

    def __init__(self, connection: HostConnection, patience: float) -> None:
        self.number = next(_numbers)
        self.models: tuple[LoadedModel, ...] | None = None
        self.problem = f"no answer within {patience:g} s"
        self.is_refused = False
        self._deadline = time.monotonic() + patience
        self._answered = threading.Event()
        connection.say(f"models {self.number}")

    @property
    def is_gone(self) -> bool:
        """Whether nothing will come any more."""
        return self._answered.is_set() or time.monotonic() >= self._deadline

    @property
    def is_over(self) -> bool:
        """The same: nothing of it runs here."""
        return self.is_gone

    def wait(self, seconds: float) -> None:
        """Wait for the answer, at most for so many seconds."""
        self._answered.wait(max(0.0, seconds))

    def hang_up(self) -> None:
        """Its answer is not wanted any more."""
        self._answered.set()

    def take(self, answer: ModelsAnswer) -> None:
        """The host has answered."""
        if not self._answered.is_set():
            self.models, self.problem = answer.models, answer.problem
            self.is_refused = answer.is_refused
            self._answered.set()


class HostMonitor(Monitor):
    """Follows the Ollama of one host."""

    def __init__(
        self,
        connection: HostConnection,
        address: Address,
        make_server: Callable[[], MonitoredServer],
    ) -> None:
        super().__init__(address, make_server)
        self._connection = connection
        self._there: HostQuestion | None = None

    def _ask(self, patience: float) -> Any:
        self.asked += 1
        self._there = self._question = HostQuestion(self._connection, patience)  # type: ignore[assignment]
        return self._there

    def take(self, answer: ModelsAnswer) -> None:
        """An answer has arrived."""
        if self._there is not None and answer.number == self._there.number:
            self._there.take(answer)
