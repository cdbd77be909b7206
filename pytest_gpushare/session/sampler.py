"""Reads the VRAM of the devices, and asks the servers what they hold, while the tests run.

The sampler reads the VRAM of the devices five times a second and the process lists once a second.
One thread reads and keeps; nothing is written while the tests run, so no slow disk can cost a
sample.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage, ProcessSplit, Statement
from pytest_gpushare.gpu.devices import Memory
from pytest_gpushare.gpu.readings import (
    MEMORY_AGE,
    MOST_ROWS,
    PROCESSES_AGE,
    RECENT_ROWS,
    DeviceSamples,
    Live,
    read_usage,
)
from pytest_gpushare.neighbours import (
    Answers,
    answer_of_ollama,
    ask_again,
    devices_of_servers,
    other_servers,
    statements_of,
    with_models,
)
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel
from pytest_gpushare.ollama.monitor import Monitor
from pytest_gpushare.session.needs_store import ModelSizes
from pytest_gpushare.session.workers import Workers

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.gpu.devices import GpuFacts
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.ollama.monitor import MonitoredServer
    from pytest_gpushare.planning.plan import Plan
    from pytest_gpushare.session.start_facts import Resident

INTERVAL = 0.2
"""Seconds between readings of a device's memory: 12 microseconds for the driver."""

PROCESSES_INTERVAL = 1.0
"""Seconds between readings of process lists: milliseconds, under a lock of the driver."""

_STOP_TIMEOUT = 1.0
_MOST_ROWS_OF_ALL = 60_000
"""Rows of all devices together: a machine with many of them must not need more memory."""


def rows_for(devices: int) -> int:
    """The most rows that each of so many devices keeps."""
    return min(MOST_ROWS, max(2 * RECENT_ROWS, _MOST_ROWS_OF_ALL // max(1, devices)))


class Sampler:
    """A service that samples the devices of the plan until it is stopped."""

    def __init__(
        self,
        live: Live,
        attribution: Attribution,
        devices: Sequence[str],
        workers: Workers,
        record: Record,
        statements: Callable[[], Sequence[Statement]] = tuple,
    ) -> None:
        """`statements`: what neighbours say of themselves, where NVML does not identify them."""
        self._statements, self._attribution = statements, attribution
        self._splits: dict[str, ProcessSplit | None] = {}
        self._live, self._workers, self._record, self._clock = live, workers, record, record.clock
        most = rows_for(len(devices))
        self.devices = {uuid: DeviceSamples(most) for uuid in devices}
        self.cpu_time = 0.0
        """Seconds of CPU time of the sampling thread."""
        self._last_processes = float("-inf")
        self._listed_workers: Mapping[int, str] = {}
        """PID -> id of the workers of the last process list."""
        self._last_memory = float("-inf")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="gpu-share-watch", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT)

    def read_workers_now(self, worker: str = "") -> None:
        """All fixtures are torn down and the workers still there: what do they hold now?

        `worker`: look at this one alone, the process of which ends before those of the others.
        """
        begun = self._clock()
        self.sample(processes=True, workers=self._workers.not_crashed())
        for member in self._workers:
            if member.kept is not None or worker not in ("", member.id):
                continue
            if member.readings and member.readings[-1][0] >= self._record.since_start(begun):
                member.kept = member.readings[-1][1]

    def _run(self) -> None:
        due = self._clock()
        while not self._stopped.is_set():
            self.sample(processes=False)
            self.cpu_time = time.thread_time()
            due = max(due + INTERVAL, self._clock())
            self._stopped.wait(due - self._clock())

    def sample(self, *, processes: bool, workers: Mapping[int, str] | None = None) -> None:
        """One row for each device; process lists when they are due, or asked for."""
        workers = self._workers.at_work() if workers is None else workers
        with self._lock:
            since = self._clock() - self._last_processes
            if not workers:
                self._note_no_workers()
            elif processes or since >= PROCESSES_INTERVAL:
                self._read_processes(workers)
            reading = self._live.memory(INTERVAL / 2)
            if reading.at <= self._last_memory:
                # The driver hangs: its last answer is not a new sample.
                return
            self._last_memory = reading.at
            at = self._record.since_start(reading.at)
            for uuid, usage in self._usage(reading.devices).items():
                self.devices[uuid].add(at, usage)

    def _usage(self, memory: Mapping[str, Memory]) -> Mapping[str, DeviceUsage]:
        watched = {uuid: now for uuid, now in memory.items() if uuid in self.devices}
        return self._attribution.usage(watched, self._splits, self._statements())

    def _read_processes(self, workers: Mapping[int, str]) -> None:
        self._last_processes = self._clock()
        self._listed_workers = workers
        before = self._live.memory(0.0).devices
        reading = self._live.processes(0.0)
        if reading.at < self._last_processes - PROCESSES_INTERVAL:
            self._forget_processes()
            return
        # The higher of both: what processes give back meanwhile must not shrink the others.
        memory = {
            uuid: max(now, before.get(uuid, now), key=lambda each: each.used)
            for uuid, now in self._live.memory(0.0).devices.items()
        }
        self._splits = {
            uuid: self._attribution.split(found, workers)
            for uuid, found in reading.devices.items()
            if uuid in memory
        }
        usage = self._usage(memory)
        # Of a worker that sees several devices, on the one where it holds the most: as counted.
        held: dict[str, int] = {}
        for uuid, device in self.devices.items():
            found = usage.get(uuid)
            device.listed(found)
            for worker, size in ((found and found.workers) or {}).items():
                held[worker] = max(size, held.get(worker, 0))
        at = self._record.since_start(reading.at)
        self._note_readings(at, held, usage, set(workers.values()))
        self._attribution.forget_all_but(
            {process.pid for found in reading.devices.values() for process in found or ()}
        )

    def _note_readings(
        self,
        at: float,
        held: Mapping[str, int],
        usage: Mapping[str, DeviceUsage],
        present: set[str],
    ) -> None:
        for member in self._workers:
            # 0 is a figure only where the worker's own device attributes processes.
            found = usage.get(member.device or "")
            if found is not None and found.workers is not None and member.id in present:
                self._workers.read(member, at, held.get(member.id, 0))

    def _note_no_workers(self) -> None:
        """No worker is there: the last process list explains what was sampled since the one
        before, and what is taken from here on is no test's."""
        if self._listed_workers:
            self._read_processes(self._listed_workers)
        self._listed_workers, self._splits = {}, {}
        for device in self.devices.values():
            device.without_tests()

    def _forget_processes(self) -> None:
        self._splits = {}
        for device in self.devices.values():
            device.listed(None)


_SERVERS_EVERY = 2.0
"""Seconds between two questions to a server, as to Ollama."""


class ServerFollower:
    """The service that asks the servers beside Ollama again, and notes what they hold.

    Where the driver names their processes their answers add nothing; in a container it may not.
    """

    def __init__(
        self,
        answers: Answers,
        ask: Callable[[Answers], Answers],
        look: Callable[[], Mapping[str, DeviceUsage]],
    ) -> None:
        self.answers = answers
        """What they said last."""
        self.resident: Resident = {}
        self._ask, self._look = ask, look
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="gpu-share-servers", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question that is open is not waited for."""
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.wait(_SERVERS_EVERY):
            # An error of the driver, or of an answer, must not end the thread.
            with contextlib.suppress(Exception):
                self.answers = self._ask(self.answers)
                usage = self._look()
                self.resident = {
                    name: {uuid: each.of(name) for uuid, each in usage.items()}
                    for name in self.answers
                }


class ServersOnHost:
    """The servers of one host during the run: what they say, what they hold, Ollama's monitor."""

    def __init__(
        self,
        settings: Settings,
        gpus: GpuFacts,
        answers: Answers,
        plan: Plan,
        live: Live | None,
        attribution: Attribution,
        workers: Workers,
        record: Record,
        make_monitor: Callable[[Address, Callable[[], MonitoredServer]], Monitor] = Monitor,
    ) -> None:
        """`plan` and `gpus` are those of the host, with the names that its devices have."""
        self._settings, self._gpus, self._plan = settings, gpus, plan
        self._answers, self._ollama = answers, answer_of_ollama(answers)
        self._attribution, self._workers, self._record = attribution, workers, record
        self.model_sizes = ModelSizes(settings, gpus, self._ollama)
        self._known = devices_of_servers(settings, gpus)
        self._devices = self._known[OLLAMA]
        self.follower: ServerFollower | None = None
        """Follows the other servers; None where nobody does."""
        self.monitor: Monitor | None = None
        """None where no server is asked, or none that holds VRAM there."""
        ollama = self._ollama
        is_asked = ollama.asked and ollama.on_this_host and self._devices != ()
        if is_asked and ollama.server is not None and live is not None:
            self.monitor = make_monitor(ollama.server, partial(self._monitored, live))

    def follow_others(self, live: Live) -> ServerFollower | None:
        """The service that follows the servers beside Ollama; None where there are none."""
        others = other_servers(self._answers)
        if others:
            ask = partial(ask_again, self._settings, os.environ)
            look = partial(read_usage, live, self._attribution)
            self.follower = ServerFollower(
                others, ask, lambda: look(self._workers.at_work(), self.statements())
            )
        return self.follower

    def resident(self) -> Resident:
        """What they hold now, as far as somebody follows them."""
        found = {} if self.monitor is None else {OLLAMA: self.monitor.resident()}
        return found if self.follower is None else {**found, **self.follower.resident}

    def statements(self, loaded: Sequence[LoadedModel] | None = None) -> tuple[Statement, ...]:
        """What they said; Ollama of these models, or of those in its last answer."""
        if loaded is None and self.monitor is not None:
            loaded = self.monitor.models
        answers = self._answers
        if self.follower is not None:
            answers = {**answers, **self.follower.answers}
        return statements_of(with_models(answers, loaded), self._known)

    def _monitored(self, live: Live) -> MonitoredServer:
        """What receives its answers, and judges them by what is held on its devices."""
        # Imported in the monitor's thread, as the workers start meanwhile.
        from pytest_gpushare.ollama.monitor import MonitoredServer
        from pytest_gpushare.ollama.spill import Promise

        known = self._gpus.all_devices if self._devices is None else self._devices
        may_use = {device.uuid for device in known}
        models = self._ollama.models if self._ollama.answered else None
        budgets = dict.fromkeys(may_use, 0)
        for slot in self._plan.slots:
            if slot.device.uuid in may_use:
                budgets[slot.device.uuid] += slot.vram

        def look(loaded: Sequence[LoadedModel], by_worker: bool) -> Mapping[str, DeviceUsage]:
            """`by_worker` reads the process lists again, which takes milliseconds; older ones are
            of another moment than the memory and would mix up workers and others."""
            usage = read_usage(
                live,
                self._attribution,
                self._workers.at_work(),
                self.statements(loaded),
                memory_age=0.0 if by_worker else MEMORY_AGE,
                processes_age=0.0 if by_worker else PROCESSES_AGE,
            )
            found = {uuid: each for uuid, each in usage.items() if uuid in may_use}
            return found if by_worker else {u: f._replace(workers=None) for u, f in found.items()}

        promise = Promise(
            start={u: each for u, each in self._attribution.start.items() if u in may_use},
            budgets=budgets,
            reservation=max(
                (d.share_of(OLLAMA).reservation for d in self._plan.devices), default=0
            ),
            safety_buffer=int(self._settings.safety_buffer),
            needed=self._plan.needed,
        )
        return MonitoredServer(models, promise, look, self._record, self.model_sizes.saw)
