"""Who holds VRAM now: Ollama, each worker with all that it started, and everybody else.

By PID where NVML tells. It does not under WDDM and WSL 2; and in a container it may name
processes of the host, whose numbers mean nothing there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.events import Event
from pytest_gpushare.gpu.attribution import Held
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess
from pytest_gpushare.gpu.host import parent_of
from pytest_gpushare.gpu.sampler import MEMORY_AGE, PROCESSES_AGE, LiveVram
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.monitor import Guard
from pytest_gpushare.ollama.reservation import devices_of_ollama, resident_bytes
from pytest_gpushare.planning.placement import NUMBER
from pytest_gpushare.session.run import LeftAlone, Started, name_of
from pytest_gpushare.session.tests import Told
from pytest_gpushare.wire import ITSELF

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.gpu.attribution import Held
    from pytest_gpushare.gpu.devices import Device
    from pytest_gpushare.gpu.sampler import LiveVram
    from pytest_gpushare.ollama.models import LoadedModel
    from pytest_gpushare.ollama.monitor import Neighbour
    from pytest_gpushare.session.run import Started


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


def guard_of(started: Started) -> Guard | None:
    """The guard of a run; None where no server is asked, or none that holds VRAM here."""
    ollama, live = started.ollama, started.live
    if not (ollama.asked and ollama.on_this_host) or ollama.server is None or live is None:
        return None
    known = devices_of_ollama(started.settings.ollama_gpu, started.gpus)
    if known == ():
        return None
    return Guard(ollama.server, lambda: _open_book(started, live, known))


def _open_book(started: Started, live: LiveVram, known: Sequence[Device] | None) -> Neighbour:
    # Imported in the guard's thread, as the workers start meanwhile.
    from pytest_gpushare.ollama.monitor import Neighbour
    from pytest_gpushare.ollama.spill import Promise

    holders = Holders(started.gpus, known, live, started.crew.at_work)
    may_use = {d.uuid for d in (started.gpus.all_devices if known is None else known)}
    models = started.ollama.models if started.ollama.answered else None
    budgets = dict.fromkeys(may_use, 0)
    for slot in started.plan.slots:
        if slot.device.uuid in may_use:
            budgets[slot.device.uuid] += slot.vram

    def look(loaded: Sequence[LoadedModel], by_worker: bool) -> Mapping[str, Held]:
        return _only(may_use, holders.now(loaded, by_worker=by_worker))

    promise = Promise(
        start=_only(may_use, holders.at_start(models or ())),
        budgets=budgets,
        reservation=max((d.reservation for d in started.plan.devices), default=0),
        safety_buffer=int(started.settings.safety_buffer),
        needed=started.plan.needed,
    )
    return Neighbour(models, promise, look, started.record, started.saw)


def _only(uuids: set[str], devices: Mapping[str, Held]) -> Mapping[str, Held]:
    return {uuid: held for uuid, held in devices.items() if uuid in uuids}


class Observer:
    """Hooks that are registered only where a plan was made."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._began = started.record.began_at
        self._passed = started.journal.passed
        self._marker = getattr(started.settings, "marker", "gpu")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to start."""
        number = node.gateway.spec.env.get(NUMBER, "")
        self._started.crew.join(
            node.gateway.id, int(number) if number.isdigit() else None, self._started.record.now()
        )

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has finished, or died."""
        crashed = error is not None and not hasattr(node, "workeroutput")
        started = self._started
        started.crew.leave(node.gateway.id, started.record.now(), crashed=crashed)
        if crashed:
            started.record.note(
                "worker-crashed", f"{node.gateway.id} crashed", worker=node.gateway.id
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test has ended."""
        node = getattr(report, "node", None)
        worker = ITSELF if node is None else node.gateway.id
        start, end = report.start - self._began, report.stop - self._began
        marked = self._marker in report.keywords
        expected_to_fail = hasattr(report, "wasxfail")
        if (
            report.outcome == "passed"
            and not expected_to_fail
            and self._passed(worker, report.nodeid, report.when, start, end, marked)
        ):
            return
        self._started.journal.told(
            worker,
            Told(
                report.nodeid,
                str(report.when),
                report.outcome,
                expected_to_fail,
                start,
                end,
                marked,
            ),
        )


def observe(
    started: Started | LeftAlone, config: pytest.Config, listener: Callable[[Event], object]
) -> None:
    """Follow the tests of a run that has a plan; its own process is a worker where it has none.

    `listener` is called with each event at once.
    """
    if isinstance(started, LeftAlone):
        return
    config.pluginmanager.register(Observer(started), "gpu-share-observer")
    started.record.listen(listener)
    if started.plan.request.in_process:
        started.crew.join(ITSELF, None if started.unplaced else 0, started.record.now())
        started.crew.came_up(ITSELF, os.getpid())


def begin(started: Started | LeftAlone, config: pytest.Config) -> None:
    """Start it; what fails is told and left out."""
    if not isinstance(started, Started):
        return
    if not started.gpus.simulated:
        from pytest_gpushare.session.registry import Presence

        # Lets `pytest-gpushare watch` see this session; a what-if has nothing to see.
        started.services.append(Presence(started, config.rootpath))
    started.guard = guard_of(started)
    if started.guard is not None:
        started.services.append(started.guard)
    if started.live is not None and started.plan.devices:
        from pytest_gpushare.session.sampling import Watch

        uuids = [planned.device.uuid for planned in started.plan.devices]
        started.watch = Watch(
            started.live, uuids, started.crew, started.record, resident=started.resident
        )
        started.services.insert(0, started.watch)
    for service in list(started.services):
        try:
            service.start()
        except Exception as error:
            started.services.remove(service)
            started.notes.append(f"{name_of(service)} could not start: {error}")
