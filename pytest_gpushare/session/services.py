"""What runs beside the tests: the services of a run, among them the monitor of Ollama."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage, Statement
from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.readings import (
    MEMORY_AGE,
    PROCESSES_AGE,
    Live,
    read_usage,
)
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.monitor import Monitor
from pytest_gpushare.ollama.reservation import devices_of_ollama
from pytest_gpushare.session.workers import Workers

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.gpu.devices import GpuFacts
    from pytest_gpushare.ollama.models import OllamaFacts
    from pytest_gpushare.ollama.monitor import MonitoredServer
    from pytest_gpushare.planning.plan import Plan
    from pytest_gpushare.service import Service
    from pytest_gpushare.session.needs_store import ModelSizes


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

    def include(self, service: Service) -> None:
        """Start one more with the others."""
        self._services.append(service)

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
    return type(getattr(service, "service", service)).__name__.lower()


class MonitoredRun(Protocol):
    """What is asked of the active run beside which Ollama is monitored."""

    settings: Settings
    gpus: GpuFacts
    ollama: OllamaFacts
    plan: Plan
    live: Live | None
    attribution: Attribution
    workers: Workers
    record: Record
    model_sizes: ModelSizes

    def statements(self, loaded: Sequence[LoadedModel] | None = ...) -> Sequence[Statement]:
        """What Ollama says that it holds, given the models that it has loaded."""


def monitor_for(run: MonitoredRun) -> Monitor | None:
    """The monitor of Ollama; None where no server is asked, or none that holds VRAM here."""
    ollama, live = run.ollama, run.live
    if not (ollama.asked and ollama.on_this_host) or ollama.server is None or live is None:
        return None
    known = devices_of_ollama(run.settings.ollama_gpu, run.gpus)
    if known == ():
        return None
    return Monitor(ollama.server, lambda: monitored_server(run, live, known))


def monitored_server(
    run: MonitoredRun, live: Live, known: Sequence[Device] | None
) -> MonitoredServer:
    """What receives the answers of Ollama, and judges them by what is held on its devices."""
    # Imported in the monitor's thread, as the workers start meanwhile.
    from pytest_gpushare.ollama.monitor import MonitoredServer
    from pytest_gpushare.ollama.spill import Promise

    may_use = {d.uuid for d in (run.gpus.all_devices if known is None else known)}
    models = run.ollama.models if run.ollama.answered else None
    budgets = dict.fromkeys(may_use, 0)
    for slot in run.plan.slots:
        if slot.device.uuid in may_use:
            budgets[slot.device.uuid] += slot.vram

    def look(loaded: Sequence[LoadedModel], by_worker: bool) -> Mapping[str, DeviceUsage]:
        """`by_worker` reads the process lists again, which takes milliseconds; older ones are of
        another moment than the memory and would mix up workers and others."""
        usage = read_usage(
            live,
            run.attribution,
            run.workers.at_work(),
            run.statements(loaded),
            memory_age=0.0 if by_worker else MEMORY_AGE,
            processes_age=0.0 if by_worker else PROCESSES_AGE,
        )
        found = {uuid: each for uuid, each in usage.items() if uuid in may_use}
        return found if by_worker else {u: f._replace(workers=None) for u, f in found.items()}

    promise = Promise(
        start={u: each for u, each in run.attribution.start.items() if u in may_use},
        budgets=budgets,
        reservation=max((d.reservation for d in run.plan.devices), default=0),
        safety_buffer=int(run.settings.safety_buffer),
        needed=run.plan.needed,
    )
    return MonitoredServer(models, promise, look, run.record, run.model_sizes.saw)
