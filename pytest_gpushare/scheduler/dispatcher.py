"""Which test goes where and when: events in, actions out. Pure: no clock, no I/O.

The parts, in the order in which to read them:

- `types`: events and actions as values; `needs`: what a test needs;
- `queue`: tests that go to one worker, and those that no worker has, found by what fits;
- `accounts`: what each worker may hold of a device; `gpu_pool` and `cpu_pool`: the workers;
- `routing` sends tests to kinds of workers and refuses what can never run; `packing` finds the
  order;
- `admission` follows it by the accounts; `backfilling` sees to it that no test waits without end;
- `pressure` frees VRAM and waits, within limits, for VRAM that others hold; `sharing` says what
  other sessions are to know;
- where tests use models: `model_queue` says which model is loaded when, `model_room` keeps its
  VRAM, and `model_dispatch` hands the tests out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.accounts import DeviceLedger
from pytest_gpushare.scheduler.admission import Admitting
from pytest_gpushare.scheduler.backfilling import Backfilling
from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.packing import ordered
from pytest_gpushare.scheduler.pressure import Pressure
from pytest_gpushare.scheduler.queue import LoadOrder, Unit
from pytest_gpushare.scheduler.routing import Fallback, routes
from pytest_gpushare.scheduler.sharing import OwnShare, Sharing
from pytest_gpushare.scheduler.types import (
    Action,
    Admit,
    DeviceCapacity,
    DeviceReading,
    Drop,
    Job,
    MoreWanted,
    Policy,
    Run,
    Worker,
)

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.model_dispatch import ModelDispatch
    from pytest_gpushare.scheduler.model_queue import ModelQueue

_PASSES = 3
"""How often in one step what an admission changed is looked at again."""


class Dispatcher:
    """Routing, order and admission of the tests of one run."""

    def __init__(
        self,
        jobs: Sequence[Job],
        capacities: Sequence[DeviceCapacity],
        policy: Policy | None = None,
        models: ModelQueue | None = None,
    ) -> None:
        """`models`: the tests that use models of Ollama's; None: there are none."""
        policy = policy or Policy()
        self._jobs = jobs
        self._ledgers = {each.uuid: DeviceLedger(each) for each in capacities}
        self._gpu = GpuPool(jobs, self._ledgers, policy)
        self._cpu = CpuPool(jobs, policy)
        self._backfilling = Backfilling(self._gpu)
        self._admitting = Admitting(self._gpu, self._cpu, self._backfilling)
        self._pressure = Pressure(self._gpu, self._backfilling)
        self._sharing = Sharing(self._gpu, self._pressure)
        self._fallback = Fallback(self._gpu, self._cpu, self._pressure)
        self.models: ModelDispatch | None = None
        """The tests that use models; it receives the results of loads."""
        if models is not None:
            from pytest_gpushare.scheduler.model_dispatch import ModelDispatch

            self.models = ModelDispatch(
                models, self._gpu, self._cpu, self._fallback, self._pressure.reclaiming
            )
            self._admitting.models = self.models
        self._left = len(jobs)
        self._readings: Mapping[str, DeviceReading] = {}
        self._reported: list[str] = []
        """The devices of which a worker has reported what it holds since they were read."""
        self._asking: list[GpuWorker] = []
        self._expected = 0
        self._begun = False
        self._alone: LoadOrder | None = None
        """Where one worker runs all tests: their order, should it die."""
        self._stopping = False

    @property
    def is_done(self) -> bool:
        """Whether every test has had its outcome."""
        return not self._left

    @property
    def due_at(self) -> float | None:
        """When a step may do something though no event comes; None: not without an event."""
        gpu = self._gpu
        waits_for_vram = (
            bool(gpu.waiting or gpu.raising)
            or gpu.is_emptying
            or (bool(gpu.pending.count) and not self._stopping and gpu.is_waited_for)
        )
        if waits_for_vram or (self.models is not None and self.models.is_due):
            return float("-inf")
        return self._admitting.next_deadline

    @property
    def wants_reading(self) -> bool:
        """Whether the next step decides by live VRAM."""
        if not self._begun:
            # What no CPU worker takes may use the GPU, and gets a slot.
            return not self._cpu.knows_all or any(job.marked for job in self._jobs)
        gpu = self._gpu
        if self.models is not None and self.models.is_due:
            return True
        return gpu.is_waited_for and (
            bool(gpu.waiting or gpu.raising)
            or gpu.pending.count > 0
            or any(worker.unit.tests for worker in gpu.workers.values())
        )

    # --- events ---

    def worker_up(self, worker: Worker, collected: Collection[int] | None = None) -> None:
        """A worker is ready; `collected` are the tests that it knows, None: all."""
        self._expected = max(0, self._expected - 1)
        if self._alone is not None:
            self._alone.up()
        if worker.devices:
            self._gpu.up(worker, collected)
        else:
            self._cpu.up(worker, collected)

    def worker_down(
        self, worker: str, *, replaced: bool = False, unsent: Collection[int] = ()
    ) -> int | None:
        """A worker has ended or died; `replaced`: another takes its place soon.

        The first of the tests that it had is over, as crashed, and returned, unless it is one of
        `unsent`, which the worker has never received; the others are dispatched again.
        """
        self._expected += replaced
        self._fallback.is_due = True
        if self.models is not None:
            self.models.queue.down(worker)
        unit = Unit([])
        if worker in self._cpu.workers:
            had = self._cpu.down(worker)
        else:
            gpu_worker = self._gpu.workers[worker]
            had = gpu_worker.sent
            self._gpu.down(gpu_worker)
            if gpu_worker.unit.tests:
                unit = gpu_worker.unit
            for device in gpu_worker.devices:
                self._pressure.released(device, self._ledgers[device].close(worker))
        running = had.pop(0) if had and had[0] not in unsent else None
        self._left -= running is not None
        self._take_back(had, unit)
        if self._alone is not None:
            self._reorder(self._alone.down(running))
        return running

    def _reorder(self, places: Mapping[int, int]) -> None:
        """Put what is pending into this order; tests that have no place keep theirs, first."""
        pending = self._gpu.pending
        units = pending.all()
        for unit in units:
            pending.take(unit)
        for unit in sorted(units, key=lambda unit: places.get(unit.tests[0], -1)):
            pending.back(unit)

    def next_test_requested(self, worker: str, test: int, when: str) -> None:
        """A worker wants to know what follows this test; `when`: at its `start` or `end`.

        Where more was sent meanwhile, that is the answer.
        """
        if worker in self._cpu.workers:
            self._cpu.next_test_requested(worker, test)
            return
        gpu_worker = self._gpu.workers[worker]
        is_last = gpu_worker.bound is None and gpu_worker.sent[-1:] == [test]
        if is_last and not gpu_worker.ending:
            gpu_worker.question = when
            self._asking.append(gpu_worker)

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
        if self._alone is not None:
            self._alone.done(test, duration or 0.0)
        used_model = self.models is not None and self.models.queue.finished(worker, test)
        if used_model:
            self._gpu.note_change()
        if worker in self._cpu.workers:
            wants_more = self._cpu.finished(worker, test, duration)
            return wants_more or used_model or not self._left
        gpu = self._gpu
        gpu_worker = gpu.workers[worker]
        if duration is not None and test not in gpu.helped and test not in gpu.refusals:
            before = gpu.average
            gpu.average = duration if before is None else before + (duration - before) / 8
        for device, size in gpu.finish(gpu_worker, test, held).items():
            self._pressure.released(device, size)
            self._reported.append(device)
        if gpu_worker.sent:
            # What it has next was admitted, or is short: nothing is free for others yet.
            if not gpu.waiting and not any(gpu.idle.values()):
                return used_model or not self._left
            gpu.note_change(gpu_worker.device)
            return True
        if gpu_worker.bound is not None:
            self._admitting.wait_for_admission(gpu_worker)
        gpu.refresh(gpu_worker)
        gpu.note_change(gpu_worker.device)
        return True

    def emptied(self, worker: str, held: Mapping[str, int] | None = None) -> None:
        """The worker has done what `EmptyCaches` asked for."""
        gpu_worker = self._gpu.workers.get(worker)
        if gpu_worker is None:
            # A CPU worker gave back the test that waited in it for a model.
            return
        gpu_worker.emptying = None
        for device in gpu_worker.devices:
            size = None if held is None else held.get(device)
            self._pressure.released(device, self._ledgers[device].emptied(worker, size))
            self._reported.append(device)
        self._gpu.refresh(gpu_worker)
        self._gpu.note_change()

    def wants_more(self, worker: str, number: int, size: int, *, takes_less: bool = False) -> None:
        """The running test of a worker wants so many bytes of its device in all; `Raised` follows.

        So it gives back, too, what it does not want any more; that has no answer.
        """
        gpu_worker = self._gpu.workers.get(worker)
        if gpu_worker is not None and gpu_worker.sent:
            self._gpu.raising[worker] = MoreWanted(number, size, takes_less)

    def returned(self, worker: str, tests: Collection[int]) -> None:
        """The worker has given back these tests, which it had not begun."""
        gpu_worker = self._gpu.workers[worker]
        back = [test for test in gpu_worker.sent if test in tests]
        for test in back:
            gpu_worker.sent.remove(test)
        self._take_back(back, gpu_worker.unit)

    def _take_back(self, tests: list[int], unit: Unit) -> None:
        """Dispatch tests again that a worker had not begun: the last ones go on with its unit, if
        they came with it, and not beside it."""
        while tests and unit.key == self._jobs[tests[-1]].group and unit.key:
            if tests[-1] in self._gpu.helped:
                break
            test = tests.pop()
            unit.put_first(test)
            if self.models is not None and self._jobs[test].model is not None:
                self.models.queue.expect_again(test)
        self._requeue(tests)

    def again(self, test: int) -> None:
        """Dispatch once more a test that is over."""
        self._left += 1
        if self._alone is None or self._jobs[test].model is not None:
            self._requeue([test])
        else:
            self._alone.again(test)
            self._gpu.put_back(Unit([test]), first=True)

    def stop(self, stopping: bool = True) -> None:
        """Say whether the run ends before its tests are done: then nothing more is handed out."""
        self._stopping = stopping

    def _requeue(self, tests: Iterable[int]) -> None:
        """Tests that no worker has any more, to whoever can run them."""
        cpu: list[int] = []
        units: list[Unit] = []
        for test in tests:
            job = self._jobs[test]
            was_helped = test in self._gpu.helped
            self._gpu.helped.discard(test)
            if self.models is not None and self.models.back(test):
                self._gpu.note_change()
            elif (was_helped or not job.marked) and self._cpu.could_run(test):
                cpu.append(test)
            elif self._alone is not None:
                units.append(Unit([test]))
            elif units and job.group and units[-1].key == job.group:
                units[-1].tests.append(test)
            else:
                units.append(Unit([test], job.group))
        if cpu:
            self._cpu.add(cpu)
        for unit in units:
            self._gpu.put_back(unit)

    # --- what is to be done ---

    def step(self, readings: Mapping[str, DeviceReading], at: float) -> list[Action]:
        """What is to be done now.

        `readings` are the devices as last read, by UUID: the same mapping as long as nothing
        was read again, and never one that has changed. `at` is the time in seconds by any clock
        that does not go back.
        """
        self.prepare(at)
        if self._reported or readings is not self._readings:
            self._read(readings)
        raised = list(self._pressure.reclaiming.raise_needs())
        return raised + (self._stop() if self._stopping else self._actions())

    def prepare(self, at: float) -> None:
        """Find the order before the first step, which may take a while."""
        self._gpu.at = at
        if not self._begun:
            self._begin()

    def shares(self) -> Mapping[str, OwnShare]:
        """Device -> what this session has there and wants, for the other sessions of the host."""
        return {device: self._sharing.of(device) for device in self._ledgers}

    def _read(self, readings: Mapping[str, DeviceReading]) -> None:
        for device in self._reported if readings is self._readings else readings:
            ledger, reading = self._ledgers.get(device), readings.get(device)
            if ledger is not None and reading is not None and ledger.read(reading):
                self._gpu.note_change(device)
        self._readings = readings
        self._reported.clear()

    def _begin(self) -> None:
        self._begun = True
        found = routes(self._gpu, self._cpu)
        if self.models is not None:
            found = self.models.take(found)
        alone = len(self._gpu.workers) == 1 and not self._cpu.workers
        self._gpu.pending = ordered(found.gpu, self._gpu, alone=alone)
        if alone and self._gpu.policy.dist == "load":
            self._alone = LoadOrder(found.gpu, self._gpu.policy.chunk)
        self._fallback.refuse(found.refused)
        for test, reason in found.without_gpu.items():
            self._fallback.decide(test, reason)
        self._cpu.add(sorted([*found.cpu, *found.without_gpu]))

    def _actions(self) -> list[Action]:
        gpu, cpu, pressure, fallback = self._gpu, self._cpu, self._pressure, self._fallback
        admitting = self._admitting
        actions: list[Action] = []
        if self.models is not None:
            self.models.release_tests()
        if fallback.is_due and not self._expected:
            fallback.decide_unrunnable()
            if self.models is not None:
                self.models.drop_unrunnable()
        if pressure.has_given_up:
            actions += fallback.decide_given_up()
        given = [] if self.models is None else list(self.models.actions())
        is_due = gpu.at >= pressure.due_at
        if is_due:
            pressure.look_everywhere()
        if self.models is not None and not self.models.has_begun:
            # Before GPU tests take the VRAM that the first model needs.
            given += self.models.loads()
        changed = gpu.take_changed()
        looked_at = changed
        for _ in range(_PASSES):
            asking, self._asking = self._asking, []
            if not changed and not asking:
                break
            actions += admitting.admit_waiting(changed)
            for worker in asking:
                if worker.question and worker.id in gpu.workers:
                    actions += admitting.answer(worker)
            actions += admitting.fill(changed)
            changed = gpu.take_changed()
        actions += self._note_begun(actions)
        actions += given
        actions += pressure.look(looked_at, at_all=is_due)
        actions += admitting.recall()
        if cpu.average is not None:
            actions += admitting.help_all()
        if cpu.workers:
            actions += cpu.refill(more_may_come=self._gpu_tests_may_come)
        if self.models is not None:
            actions += self.models.loads()
        if fallback.dropped:
            actions += self._drop()
        return actions

    def _note_begun(self, actions: Sequence[Action]) -> list[Action]:
        notes: list[Action] = []
        for action in actions:
            if isinstance(action, Admit):
                notes += self._pressure.began(action.worker, [action.test])
            elif isinstance(action, Run) and action.admitted:
                notes += self._pressure.began(action.worker, action.tests)
        return notes

    @property
    def _gpu_tests_may_come(self) -> bool:
        """Whether tests wait for a GPU that CPU workers may have to run in the end."""
        gpu = self._gpu
        return (
            gpu.policy.awaits_losses
            or self._cpu.waits
            or (self.models is not None and self.models.queue.waits)
            or gpu.has_tests_to_send
        )

    def _stop(self) -> list[Action]:
        """Let the bound tests run that fit; the others are given back, and nothing follows."""
        gpu = self._gpu
        actions = self._admitting.admit_waiting(gpu.ledgers)
        gpu.changed.clear()
        self._asking.clear()
        if self.models is not None:
            actions += self.models.stop()
        for worker in list(gpu.waiting.values()):
            if not (worker.sent or gpu.has_neighbours(worker) or worker.emptying is not None):
                actions.append(self._pressure.reclaiming.ask(worker, withdraw=True))
        return actions

    def _drop(self) -> list[Action]:
        drops: list[Action] = [Drop(test, reason) for test, reason in self._fallback.dropped]
        if self.models is not None:
            self.models.queue.forget(test for test, _ in self._fallback.dropped)
        self._fallback.dropped.clear()
        self._left -= len(drops)
        return drops
