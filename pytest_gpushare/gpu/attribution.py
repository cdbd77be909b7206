"""Attribution: which worker, neighbour or other process holds the VRAM of a device.

All figures of the plan, the scheduler, the samples and the messages come from here. The input
is what a probe reads (memory and process lists), the PIDs of the workers, and what neighbours
say of themselves.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.gpu.devices import Device, GpuProcess, Memory
from pytest_gpushare.gpu.host import generations, is_alive, parent_of
from pytest_gpushare.units import format_gb

CONTROLLER = "controller"
"""The holder that stands for this process and its descendants that are no worker's."""


class Statement(NamedTuple):
    """What a neighbour says of itself: used where NVML does not identify its processes."""

    name: str
    vram: int = 0
    """Bytes on all devices together."""
    devices: Collection[str] | None = None
    """UUIDs of the devices that it uses; None while they are unknown."""


class ProcessSplit(NamedTuple):
    """The processes of one device by their owner; bytes, None where the driver gives no size."""

    workers: Mapping[str, int | None]
    """Worker -> bytes of all its processes, descendants included."""
    descendants: Mapping[str, int]
    """Worker -> the part of it that other processes than the worker's own hold, but for those that
    its wider fixtures keep."""
    neighbours: Mapping[str, int | None]
    """Name -> bytes of its processes."""
    others: Mapping[int, int | None]
    """PID -> bytes of a process of no worker and no neighbour."""
    is_complete: bool
    """Whether every process has a known size and is visible on this host.

    In a container NVML may list PIDs of the host: one of them may be a worker under another
    number.
    """


class DeviceUsage(NamedTuple):
    """Who holds the VRAM of one device at one moment, in bytes."""

    total: int
    used: int
    free: int
    neighbours: Mapping[str, int] = {}
    """Name -> resident bytes: its processes in NVML's list, else what it says of itself, at
    most what is in use."""
    workers: Mapping[str, int] | None = None
    """Worker -> bytes with its descendants; None where the driver does not attribute them.
    A lower bound between two process lists."""
    unattributed: int = 0
    """What nobody explains of the rise since the run started: VRAM that was allocated since the
    last process list, or that the driver attributes to no process."""
    identified: Mapping[str, int] = {}
    """Neighbour -> bytes of its processes in NVML's list; no entry where it shows none."""
    descendants: Mapping[str, int] = {}
    """Worker -> the part of its bytes that processes hold which it has started."""
    explained: int = 0
    """What other processes explain: what they held before the run, and what they took since."""

    def of(self, neighbour: str) -> int:
        """Resident bytes of a neighbour."""
        return self.neighbours.get(neighbour, 0)

    @property
    def tests(self) -> int | None:
        """What all workers hold; None where the driver does not attribute processes."""
        return None if self.workers is None else sum(self.workers.values())

    @property
    def net_of_neighbours(self) -> int:
        """What is in use, less the neighbours' part."""
        return max(0, self.used - sum(self.neighbours.values()))

    @property
    def remainder(self) -> int | None:
        """What neither a neighbour nor a worker holds, as far as is known: other processes and
        the unattributed part; None where the driver does not attribute processes."""
        return None if self.tests is None else max(0, self.net_of_neighbours - self.tests)

    @property
    def others(self) -> int | None:
        """Other processes; None where the driver does not attribute processes."""
        return None if self.remainder is None else max(0, self.remainder - self.unattributed)


def combined(devices: Iterable[DeviceUsage]) -> DeviceUsage:
    """Who holds the VRAM of several devices together."""
    found = list(devices)
    workers, neighbours = Counter[str](), Counter[str]()
    for usage in found:
        workers.update(usage.workers or {})
        neighbours.update(usage.neighbours)
    return DeviceUsage(
        sum(usage.total for usage in found),
        sum(usage.used for usage in found),
        sum(usage.free for usage in found),
        neighbours,
        None if any(usage.workers is None for usage in found) else workers,
        sum(usage.unattributed for usage in found),
    )


class Attribution:
    """Attributes the VRAM of devices; remembers the owners of processes. Used by all threads.

    A process keeps its owner for as long as NVML lists it, also when its parent has ended and
    when its worker has.
    """

    def __init__(
        self,
        devices: Iterable[Device] = (),
        statements: Sequence[Statement] = (),
        *,
        parent: Callable[[int], int | None] = parent_of,
        alive: Callable[[int], bool] = is_alive,
    ) -> None:
        """`devices` and `statements` as they were before the first worker started."""
        self._parent, self._alive = parent, alive
        self._owners: dict[int, str] = {}
        self._workers: dict[int, str] = {}
        self._kept: dict[str, frozenset[int]] = {}
        self._proven: set[str] = set()
        """UUIDs of the devices on which a process was listed with its size. Before that an
        empty list proves nothing: in some containers and under WSL 2 it is always empty."""
        self._foreign: dict[str, tuple[int, int]] = {}
        """UUID -> (bytes that were in use before the run, beside neighbours and tests; the part
        of them that listed processes held)."""
        self._lock = threading.Lock()
        found = tuple(devices)
        splits = {device.uuid: self.split(device.processes, {}) for device in found}
        memory = {d.uuid: Memory(d.total, d.used, d.free) for d in found}
        self.start: Mapping[str, DeviceUsage] = self.usage(memory, splits, statements)
        """UUID -> usage before the first worker started."""
        for uuid, usage in self.start.items():
            before = usage.net_of_neighbours - (usage.tests or 0)
            self._foreign[uuid] = before, _listed(splits[uuid])

    def usage(
        self,
        memory: Mapping[str, Memory],
        splits: Mapping[str, ProcessSplit | None],
        statements: Sequence[Statement] = (),
    ) -> dict[str, DeviceUsage]:
        """UUID -> usage of each device whose memory was read.

        `splits` has the processes as they were listed last, see `split`.
        """
        neighbours = _resident(memory, splits, statements)
        with self._lock:
            return {
                uuid: self._usage(uuid, now, splits.get(uuid), neighbours[uuid])
                for uuid, now in memory.items()
            }

    def keep(self, worker: str, pids: Iterable[int]) -> None:
        """Count these processes, and what they start, as the worker's own: its fixtures keep
        them. They take the place of those that were named before."""
        with self._lock:
            self._kept[worker] = frozenset(pids)

    def split(
        self, processes: Sequence[GpuProcess] | None, workers: Mapping[int, str]
    ) -> ProcessSplit | None:
        """The processes of one device by their owner; None without a list. `workers`: PID -> id."""
        if processes is None:
            return None
        held: dict[str, int | None] = {}
        neighbours: dict[str, int | None] = {}
        descendants: dict[str, int] = {}
        others: dict[int, int | None] = {}
        is_complete = True
        with self._lock:
            self._workers.update(workers)
            for pid, used, neighbour in processes:
                if neighbour:
                    _add(neighbours, neighbour, used)
                    continue
                owner = self._owner(pid)
                if owner is None:
                    others[pid] = used
                    is_complete = is_complete and used is not None and self._alive(pid)
                    continue
                _add(held, owner, used)
                is_complete = is_complete and used is not None
                if used and self._workers.get(pid) != owner and not self._is_kept(pid, owner):
                    descendants[owner] = descendants.get(owner, 0) + used
        return ProcessSplit(held, descendants, neighbours, others, is_complete)

    def forget_all_but(self, pids: Collection[int]) -> None:
        """Forget processes that NVML lists no longer: their PIDs may be used again."""
        with self._lock:
            self._owners = {p: owner for p, owner in self._owners.items() if p in pids}

    def _is_kept(self, pid: int, worker: str) -> bool:
        kept = self._kept.get(worker, frozenset())
        return bool(kept) and any(at in kept for at in generations(pid, self._parent))

    def _owner(self, pid: int) -> str | None:
        own, found = os.getpid(), self._owners.get(pid)
        for at in generations(pid, self._parent):
            if at in self._workers:
                found = self._workers[at]
                break
            if at == own:
                found = CONTROLLER
        if found is not None:
            self._owners[pid] = found
        return found

    def _usage(
        self,
        uuid: str,
        memory: Memory,
        split: ProcessSplit | None,
        neighbours: Mapping[str, int],
    ) -> DeviceUsage:
        total, used, free = memory
        identified = {n: size for n, size in (split.neighbours if split else {}).items() if size}
        before, listed_before = self._foreign.get(uuid, (total, 0))
        held = self._held(uuid, used, before, split)
        # Other processes explain what was in use before the run, and what they took since.
        explained = max(0, before + _listed(split) - listed_before)
        beside = max(0, used - sum(neighbours.values()) - sum((held or {}).values()))
        return DeviceUsage(
            total,
            used,
            free,
            neighbours,
            held,
            max(0, beside - explained),
            identified,
            split.descendants if split else {},
            explained,
        )

    def _held(
        self, uuid: str, used: int, before: int, split: ProcessSplit | None
    ) -> dict[str, int] | None:
        """Worker -> bytes; None where the process list does not attribute them."""
        if split is None or not split.is_complete:
            return None
        sizes = [*split.workers.values(), *split.neighbours.values(), *split.others.values()]
        if any(sizes):
            self._proven.add(uuid)
        elif uuid not in self._proven and self._workers and used > before:
            return None
        return {worker: size or 0 for worker, size in split.workers.items()}


def _listed(split: ProcessSplit | None) -> int:
    """Bytes of other processes in the list."""
    return sum(size or 0 for size in split.others.values()) if split else 0


def _add(found: dict[str, int | None], name: str, used: int | None) -> None:
    before = found.get(name, 0)
    found[name] = None if used is None or before is None else before + used


def _resident(
    memory: Mapping[str, Memory],
    splits: Mapping[str, ProcessSplit | None],
    statements: Sequence[Statement],
) -> dict[str, dict[str, int]]:
    """UUID -> neighbour -> resident bytes."""
    used = {uuid: now.used for uuid, now in memory.items()}
    shown = {u: split.neighbours for u, split in splits.items() if split and u in used}
    stated = {statement.name: statement for statement in statements}
    names = [*stated, *(name for listed in shown.values() for name in listed)]
    result: dict[str, dict[str, int]] = {uuid: {} for uuid in memory}
    for name in dict.fromkeys(names):
        listed = {uuid: found[name] for uuid, found in shown.items() if name in found}
        statement = stated.get(name, Statement(name))
        candidates = [u for u in used if statement.devices is None or u in statement.devices]
        if statement.vram > sum(memory[uuid].total for uuid in candidates):
            # More than these devices have: not believed.
            statement = statement._replace(vram=0)
        found = resident_bytes(statement, used, listed)
        for uuid, size in found.items():
            result[uuid][name] = size
    return result


def resident_bytes(
    statement: Statement, used: Mapping[str, int], listed: Mapping[str, int | None]
) -> dict[str, int]:
    """UUID -> bytes that a neighbour holds there; no byte is counted on two devices.

    `used`: UUID -> bytes in use; `listed`: UUID -> bytes of its processes in NVML's list, None
    where they are listed without their size.

    NVML's figure is the best one, as a server leaves out contexts and pools. Where NVML gives
    none, what the neighbour says counts on the devices that it uses, the fullest first (while
    they are unknown: on all), and never more than is in use. Of several on which its processes
    are listed without their sizes, each gets its part: a model may be split over them.
    """
    result = {uuid: min(size, used[uuid]) for uuid, size in listed.items() if size}
    left = max(0, statement.vram - sum(result.values()))
    candidates = [u for u in used if statement.devices is None or u in statement.devices]
    split = [u for u in candidates if u in listed and u not in result]
    in_use, shared = sum(used[u] for u in split) or 1, left
    for uuid in split if len(split) > 1 else ():
        result[uuid] = min(used[uuid], shared * used[uuid] // in_use)
        left -= result[uuid]
    for uuid in sorted(candidates, key=lambda u: (-used[u], u)):
        more = min(left, used[uuid] - result.get(uuid, 0))
        result[uuid] = result.get(uuid, 0) + more
        left -= more
    return result


OTHERS = "other processes"
"""The holder in messages that stands for all other processes."""


class Holding(NamedTuple):
    """The VRAM of a device and who holds it, for a message."""

    label: str
    """`GPU 0`, as lines of output name it."""
    memory: Memory | None
    """None where NVML gives no figure."""
    by: Mapping[str, int] = {}
    """Worker, neighbour or `other processes` -> bytes; empty where nobody can be named."""

    def text(self, own: str = "") -> str:
        """`GPU 0 had 0.3 GB of 24.0 GB free: held by gw0 4.1 GB, Ollama 10.8 GB`.

        `own` is the worker that the sentence is about.
        """
        if self.memory is None:
            return f"what {self.label} had free is unknown"
        free = (
            f"{self.label} had {format_gb(self.memory.free)} of {format_gb(self.memory.total)} free"
        )
        if not self.by:
            return f"{free}; the driver does not attribute the rest to processes"
        parts = [
            f"{who}{' (its own worker)' if who == own else ''} {format_gb(size)}"
            for who, size in self.by.items()
        ]
        return f"{free}: held by {', '.join(parts)}"


def holding(
    label: str,
    memory: Memory | None,
    split: ProcessSplit | None,
    neighbours: Mapping[str, int] | None = None,
) -> Holding:
    """Who holds the VRAM of a device, the largest first.

    `neighbours` has their resident bytes, where they are known better than from the list.
    """
    if split is None:
        return Holding(label, memory, dict(neighbours or {}))
    listed = {name: size for name, size in split.neighbours.items() if size}
    found = {**listed, **(neighbours or {})}
    # A neighbour that NVML does not identify is listed as one of the others, if at all.
    others = _listed(split) - sum(found.values()) + sum(listed.values())
    found.update({worker: size for worker, size in split.workers.items() if size})
    if others > 0:
        found[OTHERS] = others
    return Holding(label, memory, dict(sorted(found.items(), key=lambda entry: -entry[1])))
