"""What runs beside the tests: the services of a run, and the monitor of Ollama among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pytest_gpushare.gpu.attribution import Held
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess
from pytest_gpushare.gpu.host import parent_of
from pytest_gpushare.gpu.sampler import MEMORY_AGE, PROCESSES_AGE, LiveVram
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.monitor import Guard
from pytest_gpushare.ollama.reservation import devices_of_ollama, resident_bytes

if TYPE_CHECKING:
    from pytest_gpushare.ollama.monitor import Neighbour
    from pytest_gpushare.session.run import ActiveRun


class Service(Protocol):
    """Something that runs beside the tests, from before the first to after the last."""

    def start(self) -> None:
        """Begin; threads are daemons."""

    def stop(self) -> None:
        """End within a second or so, and leave nothing behind."""


class Services:
    """The services of one run, in the order in which they start."""

    def __init__(self, services: Iterable[Service], problem: Callable[[str], object]) -> None:
        """`problem` is called with a sentence for each that could not start or stop."""
        self._services = list(services)
        self._problem = problem

    def start(self) -> None:
        """Start all; one that fails is reported and left out."""
        for service in list(self._services):
            try:
                service.start()
            except Exception as error:
                self._services.remove(service)
                self._problem(f"{_name(service)} could not start: {error}")

    def add(self, service: Service) -> None:
        """Start one more, and stop it before the others."""
        service.start()
        self._services.append(service)

    def runs(self, service: Service) -> bool:
        """Whether a service has not been stopped."""
        return service in self._services

    def stop(self) -> None:
        """Stop all, the last first; harmless when called twice."""
        while self._services:
            service = self._services.pop()
            try:
                service.stop()
            except Exception as error:
                self._problem(f"{_name(service)} could not stop: {error}")


def _name(service: Service) -> str:
    """The name of a service in messages."""
    return type(service).__name__.lower()


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


def monitor_for(run: ActiveRun) -> Guard | None:
    """The monitor of Ollama; None where no server is asked, or none that holds VRAM here."""
    ollama, live = run.ollama, run.live
    if not (ollama.asked and ollama.on_this_host) or ollama.server is None or live is None:
        return None
    known = devices_of_ollama(run.settings.ollama_gpu, run.gpus)
    if known == ():
        return None
    return Guard(ollama.server, lambda: _open_book(run, live, known))


def _open_book(run: ActiveRun, live: LiveVram, known: Sequence[Device] | None) -> Neighbour:
    # Imported in the monitor's thread, as the workers start meanwhile.
    from pytest_gpushare.ollama.monitor import Neighbour
    from pytest_gpushare.ollama.spill import Promise

    holders = Holders(run.gpus, known, live, run.workers.at_work)
    may_use = {d.uuid for d in (run.gpus.all_devices if known is None else known)}
    models = run.ollama.models if run.ollama.answered else None
    budgets = dict.fromkeys(may_use, 0)
    for slot in run.plan.slots:
        if slot.device.uuid in may_use:
            budgets[slot.device.uuid] += slot.vram

    def look(loaded: Sequence[LoadedModel], by_worker: bool) -> Mapping[str, Held]:
        return _only(may_use, holders.now(loaded, by_worker=by_worker))

    promise = Promise(
        start=_only(may_use, holders.at_start(models or ())),
        budgets=budgets,
        reservation=max((d.reservation for d in run.plan.devices), default=0),
        safety_buffer=int(run.settings.safety_buffer),
        needed=run.plan.needed,
    )
    return Neighbour(models, promise, look, run.record, run.model_sizes.saw)


def _only(uuids: set[str], devices: Mapping[str, Held]) -> Mapping[str, Held]:
    return {uuid: held for uuid, held in devices.items() if uuid in uuids}
