"""Whose VRAM it is: the processes of a device shared out to workers, Ollama and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_gpushare.probe.facts import GpuProcess
from pytest_gpushare.probe.host import is_alive, parent_of
from pytest_gpushare.run.series import Parts

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
