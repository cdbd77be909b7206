"""What the dispatcher decides by: free VRAM, what Ollama holds, what each worker holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pytest_gpushare.plan.work import Reading
from pytest_gpushare.probe.facts import GpuProcess, Memory
from pytest_gpushare.probe.host import parent_of
from pytest_gpushare.run.live import MEMORY_AGE, PROCESSES_AGE, LiveVram
from pytest_gpushare.units import format_gb

_DEEPEST = 32
"""Generations between a worker and a process that is taken for its descendant."""

SOONEST = 0.02
"""Seconds between two readings, however fast tests end."""

_MOST_HOLDERS = 5
"""Named in a message."""


class Readings:
    """Readings of the devices for the dispatcher; NVML is asked no more often than it must be."""

    def __init__(
        self,
        live: LiveVram | None,
        devices: Sequence[str],
        resident: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`resident` gives UUID -> bytes that Ollama holds, where somebody knows."""
        self.workers: dict[int, str] = {}
        """PID -> id of the worker, of those that are there."""
        self._live = live
        self._devices = devices
        self._resident = resident
        self._clock = clock
        self._reported: dict[str, float] = {}
        self._telling: set[str] = set()
        """UUIDs of devices of which it was told what a worker holds there."""
        self._last_report = float("-inf")
        self._basis: object = None
        """What the last answer was made of."""
        self._found: dict[str, Reading] = {}

    def has_reported(self, worker: str) -> None:
        """A GPU worker has done a test: what was read before shows what it held then."""
        self._last_report = self._reported[worker] = self._clock()

    def now(self) -> Mapping[str, Reading]:
        """UUID -> reading; empty where nobody can be asked.

        The same mapping as before as long as nothing was read anew; no answer changes later.
        """
        if self._live is None:
            return {}
        # The processes first: of what a test allocates meanwhile, free must show at least as
        # much as its worker does, or the room would be counted twice.
        age = max(SOONEST, self._clock() - self._last_report)
        processes = self._live.processes(min(PROCESSES_AGE, age))
        # Free VRAM that is older than the processes lacks what they have taken since: it would
        # be given away twice. One thread reads both, so the younger one began after the other.
        younger = max(0.0, self._clock() - processes.at)
        memory_read = self._live.memory(min(MEMORY_AGE, age, younger))
        memory = memory_read.devices
        resident = self._resident()
        # What a test that is over held would be taken for what the next one has allocated.
        old = {worker for worker, at in self._reported.items() if at > processes.at}
        basis = processes.at, memory_read.at, dict(resident), old, dict(self.workers)
        if basis == self._basis:
            return self._found
        self._basis = basis
        self._found = found = {}
        for uuid in self._devices:
            held = processes.devices.get(uuid)
            reading = _reading(memory.get(uuid), held, self.workers, resident.get(uuid))
            found[uuid] = reading._replace(
                held={**self._absent(uuid, held), **reading.held, **dict.fromkeys(old)}
            )
            if any(reading.held.values()):
                self._telling.add(uuid)
        return found

    def _absent(
        self, device: str, processes: Sequence[GpuProcess] | None
    ) -> Mapping[str, int | None]:
        """Who is not in a list that names workers: it has no context there, and holds nothing."""
        is_told = processes is not None and device in self._telling
        return dict.fromkeys(self.workers.values(), 0) if is_told else {}


def _reading(
    memory: Memory | None,
    processes: Sequence[GpuProcess] | None,
    workers: Mapping[int, str],
    resident: int | None,
) -> Reading:
    held: dict[str, int | None] = {}
    others: list[tuple[int, str]] = []
    ollama = 0
    for process in processes or ():
        owner = owner_of(process.pid, workers)
        if owner is None:
            ollama += (process.used or 0) if process.is_ollama else 0
            if not process.is_ollama and process.used:
                others.append((process.used, f"PID {process.pid} {format_gb(process.used)}"))
        elif process.used is None or held.get(owner, 0) is None:
            held[owner] = None
        else:
            held[owner] = (held.get(owner) or 0) + process.used
    told = resident if resident is not None else (ollama or None)
    names = [text for _, text in sorted(others, reverse=True)[:_MOST_HOLDERS]]
    if told:
        names.insert(0, f"Ollama {format_gb(told)}")
    return Reading(None if memory is None else memory.free, told, held, ", ".join(names))


def owner_of(pid: int, workers: Mapping[int, str]) -> str | None:
    """The worker that this process is, or from which it descends."""
    at: int | None = pid
    for _ in range(_DEEPEST):
        if at is None or at <= 1:
            break
        if at in workers:
            return workers[at]
        at = parent_of(at)
    return None
