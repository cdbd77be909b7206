"""The processes that run the tests: where each was placed, when it lived, what it held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.units import MB

LEAST = 100 * MB
"""Bytes. Handles of cuBLAS and cuDNN keep up to some 64 MB from their first use on, and no
test is to blame for them; the smallest models are larger."""

LEAST_BY_NVML = 256 * MB
"""The same where only NVML reports it: a CUDA context grows by so much as libraries are loaded."""

_ALIKE = 0.05
"""What comes back is taken for what a test left if it is as large, within this part of it."""


class LeftVram:
    """What the tests of one process left, less what came back."""

    def __init__(self) -> None:
        self._left: list[tuple[str, int]] = []
        self._small = 0
        self.is_reported = False
        """Whether the counters said anything."""

    def ran(self, nodeid: str, left: int) -> None:
        """A test ended; bytes that it left behind, negative where it gave something back."""
        self.is_reported = True
        if left > LEAST:
            self._left.append((nodeid, left))
        elif left > 0:
            self._small += left
        elif left < 0:
            self._returned(-left)

    def leaks(self) -> list[tuple[str, int]]:
        """(node id, bytes) of the tests that left more than `LEAST`, oldest first."""
        return [(nodeid, left) for nodeid, left in self._left if left > LEAST]

    def _returned(self, size: int) -> None:
        """Of what one test left, else of small things, else of the newest."""
        for at in reversed(range(len(self._left))):
            if abs(self._left[at][1] - size) <= _ALIKE * size:
                del self._left[at]
                return
        taken = min(size, self._small)
        self._small -= taken
        size -= taken
        while size > 0 and self._left:
            nodeid, left = self._left.pop()
            if left > size:
                self._left.append((nodeid, left - size))
            size -= left


_MOST_READINGS = 4096
"""An even number, for a test that runs for hours; then the higher of two readings has to do."""


class Peak(NamedTuple):
    """The most VRAM that something held, and who says so."""

    size: int
    """Bytes, the CUDA context included."""
    source: str
    """`frameworks`: their counters; `nvml`: readings of the controller, a second apart, and of the
    worker itself at the end of a test's call."""
    exact: bool = True
    """False: it was at least this much."""


def higher(one: Peak | None, other: Peak | None) -> Peak | None:
    """The larger of two peaks; what is unknown says nothing."""
    if one is None or other is None:
        return one or other
    return one if one.size >= other.size else other


@dataclass(eq=False, repr=False)
class WorkerRecord:
    """One worker, or the process itself where there are none."""

    id: str
    role: str
    """`gpu`, `cpu`, or `unplanned`: placed by the user, or not at all."""
    device: str | None
    """UUID of its device."""
    slot: int
    """Bytes of VRAM of its slot; 0 without one."""
    pid: int | None = None
    started: float | None = None
    """Seconds since the run started."""
    ended: float | None = None
    crashed: bool = False
    context: int = 0
    """Bytes of its CUDA context, measured or assumed."""
    low_at: float = float("-inf")
    """When NVML last reported so little of it that nothing can have been left behind."""
    kept: int | None = None
    """Bytes that it held, by NVML, when its fixtures were torn down; None: nobody looked."""
    counted: Peak | None = None
    """The highest peak of its tests by the frameworks' counters."""
    ran_others: bool = False
    """Whether its tests or fixtures ran other processes."""
    process: Peak | None = None
    """The most that its frameworks held, what earlier tests left in their caches included."""
    seen: Peak | None = None
    """The highest figure of NVML for it and its descendants."""
    left: LeftVram = field(default_factory=LeftVram)
    readings: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes) by NVML since the end of the last test that was reported."""

    @property
    def peak(self) -> Peak | None:
        """The most VRAM that it needed for a test; None where that is unknown."""
        return higher(self.counted, self.seen)

    @property
    def held(self) -> Peak | None:
        """The most VRAM that it held, caches included; None where that is unknown."""
        held, counted = higher(self.process, self.peak), self.process
        if held is None:
            return None
        # NVML's figure is that of the counters where it is within 5 % of it.
        is_same = counted and counted.exact and 20 * (held.size - counted.size) <= held.size
        # What its children held, no framework counts.
        return held._replace(exact=bool(held.exact or is_same) and not self.ran_others)

    @property
    def is_undercounted(self) -> bool:
        """Whether NVML showed more of it than its frameworks count: another library, or a child,
        holds VRAM there."""
        counted, seen = self.process, self.seen
        return bool(counted and seen and seen.size > counted.size + LEAST_BY_NVML)


class Workers:
    """All workers of the run, those that crashed among them; used by several threads."""

    def __init__(self, plan: Plan, context_on: Callable[[str | None], int]) -> None:
        self._plan, self._context_on = plan, context_on
        self._members: dict[str, WorkerRecord] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[WorkerRecord]:
        with self._lock:
            return iter(list(self._members.values()))

    def get(self, worker: str) -> WorkerRecord | None:
        """The worker of this id."""
        return self._members.get(worker)

    def join(self, worker: str, number: int | None, at: float) -> WorkerRecord:
        """A worker starts; `number` is its place in the plan, None where it has none from us."""
        slots = self._plan.slots
        slot = slots[number] if number is not None and number < len(slots) else None
        device = None if slot is None else slot.device.uuid
        member = WorkerRecord(
            worker,
            "gpu" if slot else "unplanned" if number is None else "cpu",
            device,
            0 if slot is None else slot.vram,
            started=at,
            context=self._context_on(device),
        )
        with self._lock:
            return self._members.setdefault(worker, member)

    def came_up(self, worker: str, pid: object) -> None:
        """A worker reports its PID."""
        member = self._members.get(worker)
        if member is not None and type(pid) is int and pid > 0:
            member.pid = pid

    def ran_others(self, worker: str) -> None:
        """Tests of a worker ran other processes."""
        if member := self._members.get(worker):
            member.ran_others = True

    def leave(self, worker: str, at: float, *, crashed: bool) -> None:
        """A worker has finished its tests, or died."""
        member = self._members.get(worker)
        if member is not None and member.ended is None:
            member.ended, member.crashed = at, crashed

    def at_work(self) -> dict[int, str]:
        """PID -> id of the workers that have not finished."""
        return {
            member.pid: member.id
            for member in self
            if member.pid is not None and member.ended is None
        }

    def not_crashed(self) -> dict[int, str]:
        """PID -> id of the workers whose processes may still be there."""
        return {m.pid: m.id for m in self if m.pid is not None and not m.crashed}

    def read(self, member: WorkerRecord, at: float, size: int) -> None:
        """NVML reported what a worker holds."""
        self.looked_at(member, at, size)
        with self._lock:
            member.readings.append((at, size))
            if len(member.readings) == _MOST_READINGS:
                pairs = zip(member.readings[::2], member.readings[1::2], strict=True)
                member.readings = [max(pair, key=lambda reading: reading[1]) for pair in pairs]

    def looked_at(self, member: WorkerRecord, at: float, size: int) -> None:
        """NVML showed the worker itself, at the end of a test's call, what it holds."""
        member.seen = higher(member.seen, Peak(size, "nvml", False) if size else None)
        if size <= member.context + LEAST_BY_NVML:
            member.low_at = max(member.low_at, at)

    def peak_between(self, member: WorkerRecord, start: float, end: float) -> Peak | None:
        """The highest reading of a worker in this time; earlier ones are then forgotten."""
        with self._lock:
            found = [size for at, size in member.readings if start <= at <= end]
            member.readings = [reading for reading in member.readings if reading[0] > end]
        size = max(found, default=0)
        return Peak(size, "nvml", False) if size else None
