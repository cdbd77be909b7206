"""Who holds the VRAM of a device at one moment: our workers, Ollama, and everybody else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.probe.facts import GpuProcess, Memory
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.run.live import LiveVram

OLLAMA, OTHERS = "Ollama", "other processes"
_MOST_PARENTS = 32


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
    workers = {pid: worker for worker, pid in pids.items()}
    found: dict[str, int] = {}
    for process in processes:
        if process.used:
            who = OLLAMA if process.is_ollama else _worker(process.pid, workers) or OTHERS
            found[who] = found.get(who, 0) + process.used
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _worker(pid: int, workers: Mapping[int, str]) -> str | None:
    for _ in range(_MOST_PARENTS):
        if pid in workers:
            return workers[pid]
        parent = _parent(pid)
        if parent is None or parent <= 1:
            return None
        pid = parent
    return None


def _parent(pid: int) -> int | None:
    """The parent of a process; None where that cannot be told (it is gone, or no Linux)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
