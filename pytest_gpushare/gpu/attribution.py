"""Whose VRAM it is: the processes of a device shared out to workers, Ollama and others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.host import is_alive, parent_of
from pytest_gpushare.gpu.sampler import Parts
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.gpu.sampler import LiveVram


class Held(NamedTuple):
    """The VRAM of one device, by holder; bytes."""

    total: int
    used: int
    free: int
    ollama: int
    """By Ollama's processes, their contexts included; without a word of NVML's on processes,
    what `/api/ps` tells."""
    workers: Mapping[str, int] | None
    """By worker, with all that it started; None where the driver does not tell whose VRAM is
    whose."""
    seen_of_ollama: int | None = None
    """What NVML shows of Ollama's processes; None where it shows none of them."""

    @property
    def tests(self) -> int | None:
        """By all workers together; None where the driver does not tell."""
        return None if self.workers is None else sum(self.workers.values())

    @property
    def others(self) -> int | None:
        """By everybody else; None where the driver does not tell."""
        if self.tests is None:
            return None
        return max(0, self.used - self.ollama - self.tests)

    @property
    def beside_ollama(self) -> int:
        """By everybody but Ollama."""
        return max(0, self.used - self.ollama)


_DEEPEST = 32
"""Generations between a worker and a process that it is asked to own."""


class Owners:
    """Which worker a process descends from; remembered, as a child may outlive its parent."""

    def __init__(
        self,
        parent: Callable[[int], int | None] = parent_of,
        alive: Callable[[int], bool] = is_alive,
    ) -> None:
        self._parent, self._alive = parent, alive
        self._known: dict[int, str] = {}

    def owner(self, pid: int, workers: Mapping[int, str]) -> str | None:
        """The worker whose process this is, or descends from; `workers`: PID -> id."""
        at: int | None = pid
        for _ in range(_DEEPEST):
            if at is None or at <= 1:
                break
            if at in workers:
                self._known[pid] = workers[at]
                return workers[at]
            at = self._parent(at)
        return self._known.get(pid)

    def is_strange(self, pid: int) -> bool:
        """Whether there is no such process here: in a container NVML tells PIDs of the host."""
        return pid not in self._known and not self._alive(pid)

    def forget_all_but(self, pids: set[int]) -> None:
        """A process that NVML lists no longer is gone; its PID may come again."""
        self._known = {pid: owner for pid, owner in self._known.items() if pid in pids}


class Teller:
    """The parts of one device's VRAM, as far as NVML tells them by process.

    Nothing is told before one process with its bytes was seen on the device: in some
    containers and under WSL 2 the list is empty, whoever holds VRAM.
    """

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._proven = False

    def parts(
        self, used: int, processes: tuple[GpuProcess, ...] | None, workers: Mapping[int, str]
    ) -> Parts:
        """Who holds what of the bytes in use; `workers`: PID -> id."""
        if processes is None:
            return Parts()
        held: dict[str, int] = {}
        ollama = 0
        for process in processes:
            owner = self._owners.owner(process.pid, workers)
            strange = owner is None and self._owners.is_strange(process.pid)
            if process.used is None or strange:
                # One that hides may be anybody's: then nobody's share is known.
                return Parts()
            self._proven = True
            if owner is not None:
                held[owner] = held.get(owner, 0) + process.used
            elif process.is_ollama:
                ollama += process.used
        if not self._proven:
            return Parts()
        return Parts(ollama, max(0, used - ollama - sum(held.values())), held)


OLLAMA, OTHERS = "Ollama", "other processes"


class Holding(NamedTuple):
    """The VRAM of a device, and who holds it."""

    label: str
    """`GPU 0`, as lines of output name it."""
    memory: Memory | None
    """None where NVML tells nothing."""
    by: Mapping[str, int] = {}
    """Worker, `Ollama` or `other processes` -> bytes; empty where the driver does not tell."""

    def text(self, own: str = "") -> str:
        """`GPU 0 had 0.3 GB of 24.0 GB free: gw0 held 4.1 GB, Ollama 10.8 GB`.

        `own` is the worker that the sentence is about.
        """
        if self.memory is None:
            return f"what {self.label} had free is unknown"
        free = (
            f"{self.label} had {format_gb(self.memory.free)} of {format_gb(self.memory.total)} free"
        )
        if not self.by:
            return f"{free}; who held the rest the driver does not tell"
        parts = [
            f"{who}{' (its own worker)' if who == own else ''} {format_gb(size)}"
            for who, size in self.by.items()
        ]
        return f"{free}: held by {', '.join(parts)}"


def holding(live: LiveVram | None, uuid: str, label: str, pids: Mapping[str, int]) -> Holding:
    """The device as it is now; `pids` names the processes of our workers."""
    if live is None:
        return Holding(label, None)
    memory = live.memory(0.0).devices.get(uuid)
    return Holding(label, memory, sums(live.processes(0.0).devices.get(uuid) or (), pids))


def sums(processes: Iterable[GpuProcess], pids: Mapping[str, int]) -> dict[str, int]:
    """Holder -> bytes, the largest first; a worker's children count as the worker."""
    # Loaded when a test has run out of memory, not at every start.

    workers, owners = {pid: worker for worker, pid in pids.items()}, Owners()
    found: dict[str, int] = {}
    for process in processes:
        if process.used:
            who = OLLAMA if process.is_ollama else owners.owner(process.pid, workers) or OTHERS
            found[who] = found.get(who, 0) + process.used
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
