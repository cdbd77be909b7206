"""What the dispatcher learns of the devices: free VRAM, and who holds what of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.gpu.attribution import Attribution, ProcessSplit
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.readings import MEMORY_AGE, PROCESSES_AGE, Live
from pytest_gpushare.ollama.models import OLLAMA
from pytest_gpushare.scheduler.types import DeviceReading
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.planning.plan import DeviceShare
    from pytest_gpushare.session.start_facts import ReadingSource, Resident

SOONEST = 0.02
"""Seconds between two readings, however fast tests end."""

_MOST_HOLDERS = 5
"""Named in a message."""


class DeviceReadings:
    """Readings of the devices for the dispatcher; NVML is asked no more often than it must be."""

    def __init__(
        self,
        live: Live | None,
        devices: Sequence[str],
        resident: Callable[[], Resident] = dict,
        attribution: Attribution | None = None,
        clock: Callable[[], float] = time.monotonic,
        shares: Mapping[str, Sequence[DeviceShare]] = {},
    ) -> None:
        """`resident` gives what servers hold, where somebody knows; `shares`: UUID -> what is kept
        for other servers than Ollama."""
        self.workers: dict[int, str] = {}
        """PID -> id of the worker, of those that are there."""
        self._live = live
        self._devices = devices
        self._resident, self._shares = resident, shares
        self._attribution = attribution or Attribution()
        self._clock = clock
        self._reported: dict[str, float] = {}
        self._naming: set[str] = set()
        """UUIDs of devices of which the driver has named what a worker holds there."""
        self._last_report = self._read_at = float("-inf")
        self._spaced_from = float("-inf")
        """When they were read last, but where that was required."""
        self._is_required = False
        self._basis: object = None
        """What the last answer was made of."""
        self._found: dict[str, DeviceReading] = {}

    def has_reported(self, worker: str) -> None:
        """A GPU worker has done a test: what was read before shows what it held then."""
        self._last_report = self._reported[worker] = self._clock()

    def require_current(self) -> None:
        """The next answer decides what a worker gets: have NVML asked, if no report is new.

        What tests have allocated since the processes were listed is missing there, and in what
        is free by now: counted twice, it would keep out what fits.
        """
        self._is_required = True

    @property
    def due_at(self) -> float:
        """When the devices may be read again, if a test is over that the last answer lacks."""
        return self._spaced_from + SOONEST if self._read_at < self._last_report else float("inf")

    def now(self) -> Mapping[str, DeviceReading]:
        """UUID -> reading; empty where nobody can be asked.

        The same mapping as before as long as nothing was read again; no answer changes later.
        """
        if self._live is None:
            return {}
        # The processes first: of what a test allocates meanwhile, free must show at least as
        # much as its worker does, or the room would be counted twice.
        now, is_required, self._is_required = self._clock(), self._is_required, False
        # What is read for a request of a worker does not delay the reading for its next report.
        soonest = 0.0 if now - self._spaced_from >= SOONEST else SOONEST
        age = SOONEST if is_required else max(soonest, now - self._last_report)
        processes = self._live.processes(min(PROCESSES_AGE, age))
        if not is_required and processes.at > self._read_at:
            self._spaced_from = processes.at
        self._read_at = processes.at
        # Free VRAM that is older than the processes lacks what they have taken since: it would
        # be given away twice. One thread reads both, so the younger one began after the other.
        younger = max(0.0, self._clock() - processes.at)
        memory_read = self._live.memory(min(MEMORY_AGE, age, younger))
        if not self._live.is_answering:
            # The last figures are of another moment: admission goes on by its accounts.
            return {}
        memory = memory_read.devices
        resident = self._resident()
        # What a test that is over held would be taken for what the next one has allocated.
        old = {worker for worker, at in self._reported.items() if at > processes.at}
        residents = {name: dict(by_device) for name, by_device in resident.items()}
        basis = processes.at, memory_read.at, residents, old, dict(self.workers)
        if basis == self._basis:
            return self._found
        self._basis = basis
        self._found = found = {}
        for uuid in self._devices:
            listed = processes.devices.get(uuid)
            split = self._attribution.split(listed, self.workers)
            stated = {name: held[uuid] for name, held in residents.items() if uuid in held}
            reading = _reading(
                memory.get(uuid), split, self.workers, stated, self._shares.get(uuid, ())
            )
            found[uuid] = reading._replace(
                held={**self._absent(uuid, listed), **reading.held, **dict.fromkeys(old)}
            )
            if any(reading.held.values()):
                self._naming.add(uuid)
        return found

    def _absent(
        self, device: str, processes: Sequence[GpuProcess] | None
    ) -> Mapping[str, int | None]:
        """Who is not in a list that names workers: it has no context there, and holds nothing."""
        is_named = processes is not None and device in self._naming
        return dict.fromkeys(self.workers.values(), 0) if is_named else {}


class AllReadings(DeviceReadings):
    """The readings of several hosts: what one lacks does not change what the others show."""

    def __init__(self, parts: Sequence[DeviceReadings]) -> None:
        super().__init__(None, ())
        self._parts = parts
        self._last: tuple[Mapping[str, DeviceReading], ...] = ()
        for part in parts:
            part.workers = self.workers

    def has_reported(self, worker: str) -> None:
        """See `DeviceReadings`."""
        for part in self._parts:
            part.has_reported(worker)

    def require_current(self) -> None:
        """See `DeviceReadings`."""
        for part in self._parts:
            part.require_current()

    @property
    def due_at(self) -> float:
        """See `DeviceReadings`."""
        return min((part.due_at for part in self._parts), default=float("inf"))

    def now(self) -> Mapping[str, DeviceReading]:
        """See `DeviceReadings`."""
        found = tuple(part.now() for part in self._parts)
        if len(found) != len(self._last) or any(
            one is not other for one, other in zip(found, self._last, strict=True)
        ):
            self._last = found
            self._found = {uuid: each for part in found for uuid, each in part.items()}
        return self._found


def readings_of(sources: Sequence[ReadingSource]) -> DeviceReadings:
    """What admission reads, of one host or of several."""
    found = [
        DeviceReadings(
            source.live,
            sorted(source.devices),
            source.resident,
            source.attribution,
            shares=source.shares,
        )
        for source in sources
    ]
    return found[0] if len(found) == 1 else AllReadings(found)


def _reading(
    memory: Memory | None,
    split: ProcessSplit | None,
    workers: Mapping[int, str],
    stated: Mapping[str, int],
    shares: Sequence[DeviceShare],
) -> DeviceReading:
    free = None if memory is None else memory.free
    listed: dict[str, int] = {}
    held: dict[str, int | None] = {}
    left_behind: dict[str, int] = {}
    others: list[tuple[int, str]] = []
    if split is not None:
        listed = {name: size for name, size in split.neighbours.items() if size}
        ids = set(workers.values())
        held = {worker: size for worker, size in split.workers.items() if worker in ids}
        left_behind = {w: size for w, size in split.descendants.items() if w in ids}
        others = [(size, f"PID {p} {format_gb(size)}") for p, size in split.others.items() if size]
    resident = {**listed, **stated}
    names = [f"{name} {format_gb(size)}" for name, size in resident.items() if size]
    names += [text for _, text in sorted(others, reverse=True)[:_MOST_HOLDERS]]
    names += [
        f"processes that tests of {worker} started {format_gb(size)}"
        for worker, size in left_behind.items()
    ]
    sizes = () if split is None else (*split.workers.values(), *split.others.values())
    return DeviceReading(
        free,
        resident.get(OLLAMA),
        held,
        ", ".join(names),
        left_behind=left_behind,
        is_attributed=bool(listed) or any(sizes),
        outstanding=sum(
            max(0, share.reservation - resident.get(share.name, share.resident)) for share in shares
        ),
    )
