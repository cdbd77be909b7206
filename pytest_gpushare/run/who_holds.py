"""Who holds VRAM now: Ollama, each worker with all that it started, and everybody else.

By PID where NVML tells. It does not under WDDM and WSL 2; and in a container it may name
processes of the host, whose numbers mean nothing there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_gpushare.plan.holding import Held
from pytest_gpushare.plan.ollama_share import resident_bytes
from pytest_gpushare.probe.facts import Device, GpuFacts, GpuProcess, LoadedModel, OllamaFacts
from pytest_gpushare.probe.host import parent_of
from pytest_gpushare.run.live import MEMORY_AGE, PROCESSES_AGE, LiveVram

CONTROLLER = "controller"
"""What the process itself is called where it is no worker."""

_DEEPEST = 64
"""Generations of processes that are looked through."""


class Holders:
    """The holders of VRAM on the devices of this host."""

    def __init__(
        self,
        gpus: GpuFacts,
        known: Sequence[Device] | None,
        live: LiveVram,
        workers: Callable[[], Mapping[int, str]],
    ) -> None:
        """`known` are the devices that Ollama uses, None while that is unknown; `workers` tells
        the workers by PID."""
        self._gpus, self._known, self._live, self._pids = gpus, known, live, workers
        self._workers: dict[int, str] = {}
        """All that were ever told: VRAM may come back late when a worker has gone."""

    def at_start(self, models: Iterable[LoadedModel]) -> Mapping[str, Held]:
        """UUID -> who held what when the plan was made."""
        return self._held({d.uuid: d for d in self._gpus.all_devices}, models)

    def now(
        self, models: Iterable[LoadedModel], *, by_worker: bool, max_age: float = MEMORY_AGE
    ) -> Mapping[str, Held]:
        """UUID -> who holds what, where `models` are those that Ollama has loaded.

        `by_worker` reads the lists of processes anew, which takes milliseconds; without it
        they would tell of another moment than the VRAM, and workers and others would be mixed
        up. `max_age` is in seconds. A device that cannot be read is left out.
        """
        processes = self._live.processes(0.0 if by_worker else PROCESSES_AGE).devices
        memory = self._live.memory(0.0 if by_worker else max_age).devices
        devices = {
            d.uuid: replace(
                d,
                total=memory[d.uuid].total,
                used=memory[d.uuid].used,
                free=memory[d.uuid].free,
                processes=processes.get(d.uuid),
            )
            for d in self._gpus.all_devices
            if d.uuid in memory
        }
        held = self._held(devices, models)
        return held if by_worker else {u: h._replace(workers=None) for u, h in held.items()}

    def _held(
        self, devices: Mapping[str, Device], models: Iterable[LoadedModel]
    ) -> Mapping[str, Held]:
        known = None
        if self._known is not None:
            known = tuple(devices[d.uuid] for d in self._known if d.uuid in devices)
        facts = GpuFacts(all_devices=tuple(devices.values()))
        told = OllamaFacts(asked=True, answered=True, models=tuple(models))
        resident = resident_bytes(known, facts, told)
        return {
            uuid: Held(
                device.total,
                device.used,
                device.free,
                resident.get(uuid, 0),
                self._by_worker(device.processes),
                _seen_of_ollama(device.processes),
            )
            for uuid, device in devices.items()
        }

    def _by_worker(self, processes: Sequence[GpuProcess] | None) -> Mapping[str, int] | None:
        if processes is None:
            return None
        self._workers.update(self._pids())
        found: dict[str, int] = {}
        for process in processes:
            if process.is_ollama:
                continue
            if process.used is None:
                return None
            owner = self._owner(process.pid)
            if owner is None:
                # A process that this host does not know: one of ours under another number?
                return None
            if owner:
                found[owner] = found.get(owner, 0) + process.used
        return found

    def _owner(self, pid: int) -> str | None:
        """The worker to which a process belongs, empty for a stranger's; None: unknown."""
        first = pid
        for _ in range(_DEEPEST):
            if pid in self._workers:
                return self._workers[pid]
            if pid == os.getpid():
                return CONTROLLER
            above = parent_of(pid)
            if above is None:
                return None if pid == first and Path("/proc/self").exists() else ""
            if above <= 1:
                break
            pid = above
        return ""


def _seen_of_ollama(processes: Sequence[GpuProcess] | None) -> int | None:
    sizes = [process.used for process in processes or () if process.is_ollama]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None
