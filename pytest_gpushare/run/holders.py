"""Who holds the VRAM of a device at one moment: our workers, Ollama, and everybody else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.probe.facts import GpuProcess, Memory
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.run.live import LiveVram

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
    from pytest_gpushare.run.owners import Owners

    workers, owners = {pid: worker for worker, pid in pids.items()}, Owners()
    found: dict[str, int] = {}
    for process in processes:
        if process.used:
            who = OLLAMA if process.is_ollama else owners.owner(process.pid, workers) or OTHERS
            found[who] = found.get(who, 0) + process.used
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
