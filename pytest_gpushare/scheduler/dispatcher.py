"""Which test goes where and when: events in, actions out. Pure: no clock, no I/O.

The parts: `routing` sends tests to kinds of workers and sorts out what can never run,
`packing` finds the order, `filling` follows it and admits by the `accounts`, `claims` sees to
it that nobody starves, `waiting` makes room and bears with others, `cpu_side` fills deep
queues, and `helping` lets idle GPU workers take from them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pytest_gpushare.scheduler.accounts import Ledger, held_on
from pytest_gpushare.scheduler.admission import Filling
from pytest_gpushare.scheduler.cpu_pool import CpuSide, Helping
from pytest_gpushare.scheduler.fallback import Without
from pytest_gpushare.scheduler.gpu_pool import GpuSide
from pytest_gpushare.scheduler.pressure import Waiting
from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.routing import ordered, routes
from pytest_gpushare.scheduler.types import (
    Action,
    Drop,
    Job,
    Lost,
    Policy,
    Reading,
    Room,
    Shutdown,
    Worker,
)


class Dispatcher:
    """Routing, order and admission of the tests of one run."""

    def __init__(
        self, jobs: Sequence[Job], rooms: Sequence[Room], policy: Policy | None = None
    ) -> None:
        policy = policy or Policy()
        self._jobs = jobs
        self._ledgers = {room.uuid: Ledger(room) for room in rooms}
        self._gpu = GpuSide(jobs, self._ledgers, policy)
        self._cpu = CpuSide(jobs, policy)
        self._filling = Filling(self._gpu)
        self._waiting = Waiting(self._gpu)
        self._helping = Helping(self._gpu, self._cpu)
        self._without = Without(self._gpu, self._cpu, self._waiting)
        self._left = len(jobs)
        self._readings: Mapping[str, Reading] = {}
        self._reported: list[str] = []
        """The devices of which a worker has told what it holds since they were read."""
        self._expected = 0
        self._begun = False
        self._gone = False
        """Whether workers went since it was asked last who can run what."""

    @property
    def is_done(self) -> bool:
        """Whether every test has had its outcome."""
        return not self._left

    @property
    def wants_step(self) -> bool:
        """Whether a step may do something though no event comes: tests wait for VRAM."""
        return self.wants_reading

    @property
    def wants_reading(self) -> bool:
        """Whether the next step decides by live VRAM."""
        if not self._begun:
            # What no CPU worker takes may use the GPU, and gets a slot.
            return not self._cpu.knows_all or any(job.marked for job in self._jobs)
        return self._gpu.is_waited_for and (
            self._gpu.pending.count > 0
            or self._without.waits
            # What a busy worker has begun may be shared.
            or any(it.is_bound for it in self._gpu.workers.values())
        )

    def worker_up(self, worker: Worker, collected: Collection[int] | None = None) -> None:
        """A worker is ready; `collected` are the tests that it knows, None: all."""
        self._expected = max(0, self._expected - 1)
        if worker.devices:
            self._gpu.up(worker, collected)
        else:
            self._cpu.up(worker, collected)

    def worker_down(self, worker: str, *, replaced: bool = False, began: bool = True) -> Lost:
        """A worker has ended or died; `replaced`: another takes its place soon.

        The test that it ran is over, as crashed; the others that it had are dispatched anew,
        and that one too where it had not begun it.
        """
        self._expected += replaced
        self._gone = True
        running: int | None = None
        queued: list[int] = []
        if worker in self._cpu.workers:
            had = self._cpu.down(worker)
            running, queued = (had[0], had[1:]) if had and began else (None, had)
            self._add_cpu(queued)
        elif worker in self._gpu.workers:
            running, queued = self._gpu_down(worker, began)
        self._left -= running is not None
        return Lost(running, tuple(queued))

    def _gpu_down(self, worker: str, began: bool) -> tuple[int | None, list[int]]:
        it = self._gpu.workers[worker]
        helped = self._helping.down(worker)
        if not began:
            it.not_begun(bool(helped))
        queued = self._gpu.down(it)
        for device in it.devices:
            self._waiting.released(device, self._ledgers[device].close(worker))
        running, back = (helped[0], helped[1:]) if helped and began else (it.test, helped)
        self._add_cpu(back)
        return running, [*queued, *back]

    def _add_cpu(self, tests: list[int]) -> None:
        """Unmarked tests that come back, to whoever can run them."""
        mine = [test for test in tests if self._cpu.could_run(test)]
        self._cpu.add(mine)
        for test in tests:
            if test not in mine:
                self._gpu.pending.back(Unit([test]))
                self._gpu.stir()

    def finished(
        self,
        worker: str,
        test: int,
        held: Mapping[str, int] | None = None,
        duration: float | None = None,
    ) -> bool:
        """The worker has done the test, and holds so many bytes of each device (UUID) now.

        `duration` in seconds. Returns whether a step would do something.
        """
        self._left -= 1
        if worker in self._cpu.workers:
            return self._cpu.finished(worker, test, duration) or not self._left
        it = self._gpu.workers.get(worker)
        if it is None:
            return True
        helped = self._helping.finished(worker, test)
        if helped is False:
            return False
        if helped is None and it.test == test:
            for device in it.devices:
                ledger = self._ledgers[device]
                if worker in ledger.running:
                    given = ledger.stop(worker, held_on(held, device))
                    self._waiting.released(device, given)
                    self._reported.append(device)
        self._gpu.rest(it)
        return True

    def emptied(self, worker: str, held: Mapping[str, int] | None = None) -> None:
        """The worker has emptied its caches as `EmptyCaches` asked."""
        it = self._gpu.workers.get(worker)
        if it is None:
            return
        it.emptying = None
        for device in it.devices:
            given = self._ledgers[device].emptied(worker, held_on(held, device))
            self._waiting.released(device, given)
            self._reported.append(device)
        self._gpu.refresh(it)
        self._gpu.stir()

    def again(self, test: int) -> None:
        """Dispatch once more a test that is over."""
        self._left += 1
        if not self._jobs[test].marked and self._cpu.could_run(test):
            self._cpu.add([test])
        else:
            self._gpu.pending.back(Unit([test]))
            self._gpu.stir()

    def step(self, readings: Mapping[str, Reading], at: float) -> list[Action]:
        """What is to be done now.

        `readings` are the devices as last read, by UUID: the same mapping as long as nothing
        was read anew, and never one that has changed. `at` is the time in seconds by any clock
        that does not go back.
        """
        self._gpu.at = at
        if not self._begun:
            self._begin()
        if self._reported or readings is not self._readings:
            self._read(readings)
        return self._actions()

    def _read(self, readings: Mapping[str, Reading]) -> None:
        for device in self._reported if readings is self._readings else readings:
            ledger, reading = self._ledgers.get(device), readings.get(device)
            if ledger is not None and reading is not None and ledger.read(reading):
                self._gpu.stir(device)
        self._readings = readings
        self._reported.clear()

    def _begin(self) -> None:
        self._begun = True
        found = routes(self._jobs, self._gpu, self._cpu)
        self._gpu.pending, self._gpu.cold = ordered(found.gpu, self._jobs, self._gpu)
        self._without.refuse(found.refused)
        cpu = set(found.cpu)
        for test, reason in found.without.items():
            if self._without.decide(test, reason):
                cpu.add(test)
        self._cpu.add(sorted(cpu))

    def _actions(self) -> list[Action]:
        gpu, cpu, waiting, without = self._gpu, self._cpu, self._waiting, self._without
        actions: list[Action] = []
        if self._gone and not self._expected:
            self._gone = False
            without.orphans()
        if without.waits:
            actions += without.report()
        is_due = gpu.at >= waiting.due_at
        if is_due:
            waiting.stir()
        stirred = gpu.take_stirred()
        if stirred:
            runs = self._filling.fill(stirred)
            actions += waiting.begun(runs) if waiting.is_blocked else runs
        actions += waiting.look(stirred, at_all=is_due)
        if waiting.has_given_up and without.sort_out():
            actions += without.report()
        if cpu.workers:
            actions += cpu.refill()
        if cpu.average is not None:
            actions += self._helping.begin()
        if cpu.workers:
            actions += cpu.flush()
        if without.dropped:
            actions += self._drop()
        if not self._left:
            actions += self._end()
        return actions

    def _drop(self) -> list[Drop]:
        drops = [Drop(test, reason) for test, reason in self._without.dropped]
        self._without.dropped.clear()
        self._left -= len(drops)
        return drops

    def _end(self) -> Iterator[Action]:
        for gpu_worker in self._gpu.workers.values():
            if not gpu_worker.ending:
                gpu_worker.ending = True
                self._gpu.refresh(gpu_worker)
                yield Shutdown(gpu_worker.id)
        for cpu_worker in self._cpu.workers.values():
            if not cpu_worker.ending:
                cpu_worker.ending = True
                yield Shutdown(cpu_worker.worker.id)
