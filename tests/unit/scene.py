"""A run without its processes: a machine whose readings a test sets, and a clock that it turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.events import Record
from pytest_gpushare.gpu.devices import GpuFacts, GpuProcess, HostFacts, Memory
from pytest_gpushare.gpu.readings import Reading
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.session.tests import PhaseReport
from pytest_gpushare.units import GB

from .test_planning_sizing import DEFAULTS, device

# PIDs beyond what a kernel gives: no process of this machine is meant.
FIRST_PID = 2**22 + 100
CONTEXT = 600 * 2**20


class Card:
    """One device of 24 GB, 2 of them in use by nobody that NVML lists."""

    def __init__(self, now: list[float], uuid: str) -> None:
        self._now, self._uuid = now, uuid
        self.held: dict[int, int] = {}
        """PID -> bytes."""
        self.silent = False
        """Whether it tells nothing by process."""
        self.asked = 0
        """How often it was asked for its processes."""

    def memory(self, _max_age: float = 0) -> Reading[Memory]:
        used = 2 * GB + sum(self.held.values())
        return Reading({self._uuid: Memory(24 * GB, used, 24 * GB - used)}, self._now[0])

    def processes(self, _max_age: float = 0) -> Reading[tuple[GpuProcess, ...] | None]:
        self.asked += 1
        if self.silent:
            return Reading({self._uuid: None}, self._now[0])
        found = tuple(GpuProcess(pid, size) for pid, size in self.held.items() if size)
        return Reading({self._uuid: found}, self._now[0])


class Scene:
    """A run with GPU workers on that device."""

    def __init__(
        self,
        workers: int = 2,
        cpus: int = 8,
        request: Request | None = None,
        free: float = 22,
        **settings: Any,
    ) -> None:
        self._now = [0.0]
        gpus = GpuFacts((device(free),), (device(free),), driver="580.95.05")
        ollama, host = OllamaFacts(), HostFacts(cpus)
        chosen = DEFAULTS._replace(**settings)

        def planned(changed: Settings) -> Plan:
            return plan_run(changed, gpus, {OLLAMA: ollama}, host, request or Request())

        self.card = Card(self._now, gpus.devices[0].uuid)
        clock = lambda: self._now[0]  # noqa: E731
        facts = StartFacts(chosen, gpus, {OLLAMA: ollama}, planned(chosen), planned, self.card)
        self.active = ActiveRun(facts, record=Record(clock))
        (self.sampler,) = self.active.samplers
        for number in range(workers):
            self.active.workers.join(f"gw{number}", number, 0.0)
            self.active.workers.came_up(f"gw{number}", FIRST_PID + number)

    def tick(self, seconds: float) -> None:
        """Let time pass, sampled as in a run."""
        until = round(self._now[0] + seconds, 6)
        while self._now[0] < until:
            self._now[0] = round(self._now[0] + 0.2, 6)
            self.sampler.sample(processes=False)

    def hold(self, worker: int, size: float) -> None:
        """A worker holds so many GB, its context included."""
        self.card.held[FIRST_PID + worker] = int(size * GB)

    def ran(
        self,
        nodeid: str,
        worker: int = 0,
        seconds: float = 1.0,
        *,
        holds: float | None = None,
        counted: Mapping[str, Any] | None = None,
        marked: bool = False,
        outcome: str = "passed",
    ) -> None:
        """A test runs on a worker; it holds so many GB, and the frameworks count this."""
        start = self._now[0]
        before = self.card.held.get(FIRST_PID + worker, 0)
        if holds is not None:
            self.hold(worker, holds)
        self.tick(seconds)
        if holds is not None:
            self.card.held[FIRST_PID + worker] = before
        name = f"gw{worker}"
        if counted is not None:
            told = {"nodeid": nodeid, "exact": True, "left": 0, **counted}
            self.active.links.receive(name, ("test", told))
        end = self._now[0]
        for when in ("setup", "call", "teardown"):
            how = outcome if when == "call" else "passed"
            self.active.tests.reported(
                name, PhaseReport(nodeid, when, how, False, start, end, marked)
            )

    def finish(self) -> ActiveRun:
        """The workers end, and are looked at a last time."""
        for member in self.active.workers:
            self.active.workers.leave(member.id, self._now[0], crashed=False)
        self._now[0] += 1
        self.sampler.read_workers_now()
        return self.active
