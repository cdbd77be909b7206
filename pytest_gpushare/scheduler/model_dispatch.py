"""Where tests that use a model meet the workers: CPU workers where there are any, else GPU workers.

A test that uses a model needs no VRAM of its own. It is sent only to a worker that has nothing to
do, or that asks for what follows, so that it starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.model_queue import State
from pytest_gpushare.scheduler.model_room import ModelRoom
from pytest_gpushare.scheduler.queue import GROUPED, Unit, in_units
from pytest_gpushare.scheduler.types import (
    AFTER,
    BEFORE,
    Action,
    Admission,
    Admit,
    CloseModel,
    EmptyCaches,
    Run,
)

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.cpu_pool import CpuPool, CpuWorker
    from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
    from pytest_gpushare.scheduler.model_queue import GroupState, ModelQueue, Offer
    from pytest_gpushare.scheduler.pressure import Reclaiming
    from pytest_gpushare.scheduler.routing import Fallback, Routes


IDLE = 1.0
"""Seconds for which no worker runs anything before a model is unloaded that no worker can use."""


class ModelDispatch:
    """Hands out the tests of a `ModelQueue`."""

    def __init__(
        self,
        models: ModelQueue,
        gpu: GpuPool,
        cpu: CpuPool,
        fallback: Fallback,
        reclaiming: Reclaiming,
    ) -> None:
        self.queue = models
        self._reclaiming = reclaiming
        self.has_begun = False
        """Whether it was decided which model comes first."""
        self._idle_since: float | None = None
        """Since when no worker runs anything."""
        self._awaited: dict[int | None, float] = {}
        """Group -> since when a worker runs nothing, as the model is not there yet."""
        self._room = ModelRoom(models, gpu, reclaiming)
        self._jobs, self._gpu, self._cpu, self._fallback = gpu.jobs, gpu, cpu, fallback
        cpu.divert = self._take_over
        gpu.bars = self.bars

    def take(self, found: Routes) -> Routes:
        """Take the tests that use a model out of the routes; the others stay as they are."""
        cpu = self._take_unmarked(found.cpu)
        gpu = self._take_unmarked(found.gpu)
        uses = {test: model for test in gpu if (model := self._jobs[test].model) is not None}
        refused = {test: why for test, at in uses.items() if (why := self._room.refuses(test, at))}
        found = found._replace(refused={**found.refused, **refused})
        gpu = [test for test in gpu if test not in refused]
        both = [test for test in uses if test not in refused]
        for test in both:
            self._room.limit_unknown(test, uses[test])
        if self._gpu.policy.dist in GROUPED:
            self.queue.expect(both)
        else:
            self.queue.hold(both)
            gpu = [test for test in gpu if self._jobs[test].model is None]
        self.drop_unrunnable()
        return found._replace(cpu=cpu, gpu=gpu)

    def drop_unrunnable(self) -> None:
        """Drop the tests that no worker which is left has collected."""
        gpu, cpu = self._gpu, self._cpu

        def could_run(*tests: int) -> bool:
            return cpu.could_run(*tests) or any(
                worker.knows(*tests) and not worker.ending for worker in gpu.workers.values()
            )

        for test in self.queue.take_unrunnable(could_run):
            self._fallback.dropped.append((test, "no worker that has collected it is left"))

    def _take_over(self, test: int) -> bool:
        """Take a test that would go to a CPU worker though it uses a model."""
        if self._jobs[test].model is None:
            return False
        self.queue.take_over(test)
        return True

    def _take_unmarked(self, tests: list[int]) -> list[int]:
        jobs, queue = self._jobs, self.queue
        if self._gpu.policy.dist not in GROUPED:
            queue.add(test for test in tests if queue.owns(test))
            return [test for test in tests if not queue.owns(test)]
        rest: list[int] = []
        for unit in in_units(tests, jobs):
            uses_models = any(queue.owns(test) for test in unit.tests)
            if uses_models and not any(jobs[test].marked for test in unit.tests):
                queue.add_chain(unit.tests)
            else:
                queue.expect(t for t in unit.tests if queue.owns(t))
                rest += unit.tests
        return rest

    def back(self, test: int) -> bool:
        """Take a test in that comes back; False: it does not belong here."""
        uses_model = self._jobs[test].model is not None
        is_grouped = self._gpu.policy.dist in GROUPED
        if self.queue.owns(test) or (uses_model and not is_grouped):
            self.queue.back(test)
            return True
        if uses_model:
            self.queue.expect([test])
        return False

    def release_tests(self) -> None:
        """Let tests that need VRAM, too, go to GPU workers where their models are there."""
        gpu = self._gpu
        for test in reversed(self.queue.release()):
            refusal = self.queue.refusal_of(test)
            if refusal is not None:
                gpu.refuse(test, *refusal)
            unit = Unit([test])
            if any(map(self._is_free, gpu.workers.values())) and (waited := self._waited(test)):
                # It goes on to wait, for VRAM.
                unit.since = gpu.at - waited
            # First, as it has one of the places for which others wait.
            gpu.put_back(unit, first=True)
            # Its worker may have gone while it was held back, and another may take its place.
            self._fallback.is_due = True

    def actions(self) -> Iterator[Action]:
        """What is to be done now for these tests, on CPU workers and beside them."""
        queue, cpu = self.queue, self._cpu
        for id_, admitted in queue.open_gate():
            waited = self._waited(admitted.test)
            yield Admit(id_, admitted.test, Admission(refusal=admitted.refusal, waited=waited))
        wanted = queue.workers_wanted
        for number, worker in enumerate(cpu.workers.values()):
            worker.is_shallow = number < wanted
            worker.is_taken = queue.has_chain(worker.id)
            if not worker.ending and (not worker.sent or worker.asks):
                offer = queue.offer(worker.id, worker.knows)
                if offer is not None:
                    yield self._to_cpu(worker, offer)

    def loads(self) -> list[Action]:
        """The models to load, and those that nothing uses any more: after all was handed out."""
        self.has_begun = True
        gpu, queue = self._gpu, self.queue
        bound = [worker.bound for worker in gpu.waiting.values() if worker.bound is not None]
        is_idle = self._has_been_idle()
        may_open = queue.phase != AFTER or is_idle or not self._gpu_tests_are_left()
        actions: list[Action] = []
        for action in queue.actions(bound, is_idle=is_idle, may_open=may_open):
            holds_vram = bool(queue.groups[action.group].facts.reservations)
            if isinstance(action, CloseModel):
                more = queue.waits or self._gpu_tests_are_left()
                actions.append(action._replace(makes_room=holds_vram and more))
                continue
            if holds_vram:
                # Until it is known that the turn takes a while.
                self._room.hold(action.group)
            actions.append(action._replace(turn_only=holds_vram))
        actions += self._room.look()
        if queue.phase == BEFORE or self._room.is_held:
            actions += self._withdraw()
        # A test that has not begun now does not wait for a model that is there.
        self._awaited = {
            number: self._awaited.get(number, gpu.at)
            for number, group in enumerate(queue.groups)
            if group.state is State.OPENING and self._has_free_worker(group)
        }
        return actions

    def _has_free_worker(self, group: GroupState) -> bool:
        """Whether a worker that could run a test of this group runs nothing."""
        needs_vram = bool(group.held or group.elsewhere)
        workers: list[GpuWorker | CpuWorker] = []
        if group.pending or not needs_vram:
            workers += self._cpu.workers.values()
        if needs_vram or not self._cpu.workers:
            workers += self._gpu.workers.values()
        return any(self._is_free(worker) and not worker.ending for worker in workers)

    def _waited(self, test: int) -> float:
        """Seconds for which a worker that begins this test waited for its model.

        The first test of a model waits for it; those behind it wait for that one.
        """
        return self._gpu.at - self._awaited.pop(self._jobs[test].model, self._gpu.at)

    def _has_been_idle(self) -> bool:
        """Whether all have been idle for a moment, so that idle workers have given VRAM back."""
        if not self._is_idle():
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = self._gpu.at
        return self._gpu.at - self._idle_since >= IDLE or not self._gpu.workers

    def _withdraw(self) -> Iterator[Action]:
        """Take back tests that wait in workers for what a model has for long."""
        gpu, queue = self._gpu, self.queue
        starves = not any(gpu.idle.values()) and (queue.has_offers or self._lacks_worker())
        for worker in list(gpu.waiting.values()):
            test = worker.bound
            if test is None or not worker.is_between_tests or self.may_wait(worker, test):
                continue
            if starves or gpu.bytes_for(worker, test) > gpu.ledgers[worker.device].capacity.budget:
                yield self._reclaiming.ask(worker, withdraw=True)

    # --- what came of loads, and what may start ---

    @property
    def is_due(self) -> bool:
        """Whether a model waits for VRAM, so that the devices are to be read."""
        since = self._idle_since
        waits = self._room.due is not None or (
            since is not None and self._gpu.at - since < 2 * IDLE
        )
        return waits and bool(self._gpu.workers or self._cpu.workers)

    def has_turn(self, group: int, *, waits: bool) -> None:
        """VRAM is what the model waits for now; `waits`: not yet, GPU tests go on meanwhile."""
        if waits:
            self.release(group)
        else:
            self._room.await_room(group)

    def began(self, worker: GpuWorker, test: int) -> float:
        """A test was admitted; one whose model is missing is refused.

        Returns the seconds for which the worker waited for the model.
        """
        queue, refusals = self.queue, self._gpu.refusals
        refusal = queue.refusal_of(test)
        if refusal is not None:
            refusals.setdefault(test, refusal)
        if test in refusals:
            # It is reported without being run, and takes no place.
            queue.forget([test])
        else:
            queue.begin(worker.id, test)
        return self._waited(test)

    def allows(self, worker: str, test: int) -> bool:
        """Whether a test may start as far as models go."""
        if self._has_no_turn(test):
            return False
        self.queue.want(test)
        return self.queue.may_start(worker, test)

    def bars(self, worker: GpuWorker, test: int) -> bool:
        """Whether a test waits for a model: to be loaded, or to give VRAM back."""
        if test in self._gpu.refusals:
            return False
        return (
            self._has_no_turn(test)
            or not self.queue.may_start(worker.id, test)
            or any(self._gpu.bytes_for(worker, test) > most for most in self._kept(worker, test))
        )

    def may_wait(self, worker: GpuWorker, test: int) -> bool:
        """Whether a test may wait in a worker: not where models keep its VRAM for long."""
        if test in self._gpu.refusals:
            return True
        queue = self.queue
        if self._has_no_turn(test):
            return False
        budgets = self._kept(worker, test)
        # The worker is for the tests of the model, until this one fits.
        is_for_models = (queue.waits and not self._cpu.workers) or self._lacks_worker()
        if budgets and test not in queue.released and is_for_models:
            return False
        return all(self._gpu.bytes_for(worker, test) <= most for most in budgets)

    def _lacks_worker(self) -> bool:
        """Whether a test that has a place is in no GPU worker."""
        bound = {worker.bound for worker in self._gpu.workers.values()}
        return not self.queue.released <= bound

    def _has_no_turn(self, test: int) -> bool:
        queue = self.queue
        return queue.phase == BEFORE and self._jobs[test].model is None and queue.is_active

    def _kept(self, worker: GpuWorker, test: int) -> list[int]:
        """The budgets of a test's devices where models have some of it."""
        gpu = self._gpu
        ledgers = [gpu.ledgers[uuid] for uuid in gpu.devices(worker, test)]
        return [ledger.capacity.budget for ledger in ledgers if ledger.has_model_reservation]

    def release(self, group: int) -> None:
        """Nothing is kept for this model any more."""
        self._idle_since = None
        self._room.release(group)

    def opened(self, group: int, size: int | None = None) -> None:
        """A model is loaded, and takes so many bytes, where that is known."""
        self.queue.opened(group)
        self._idle_since = None
        if size is not None:
            self._room.fit(group, size)
        self._gpu.note_change()

    def not_opened(self, group: int, reason: str) -> None:
        """The model of this group cannot be loaded."""
        self.queue.not_opened(group, reason)
        self.release(group)

    def closed(self, group: int) -> None:
        """Nothing keeps the model of this group any more."""
        self.queue.closed(group)
        self.release(group)

    def limit(self, group: int, places: int) -> int:
        """Let so many tests of this group be under way at once. Returns how many are."""
        if self.queue.limit(group, places):
            self._gpu.note_change()
        return self.queue.groups[group].taken

    def _gpu_tests_are_left(self) -> bool:
        gpu = self._gpu
        return gpu.has_tests_to_send or any(
            test not in gpu.helped for worker in gpu.workers.values() for test in worker.sent
        )

    def _is_idle(self) -> bool:
        workers: list[GpuWorker | CpuWorker] = [*self._gpu.workers.values()]
        workers += self._cpu.workers.values()
        return (
            bool(workers)
            and all(worker.emptying is None for worker in self._gpu.workers.values())
            and all(map(self._is_free, workers))
        )

    def _is_free(self, worker: GpuWorker | CpuWorker) -> bool:
        """Whether a worker runs nothing: its test, if it has one, waits in it for a model."""
        return not worker.sent or worker.sent == [self.queue.gate.get(worker.id)]

    def _to_cpu(self, worker: CpuWorker, offer: Offer) -> Run:
        worker.asks = False
        worker.sent.append(offer.test)
        worker.is_taken = self.queue.has_chain(worker.id)
        return self._run(worker.id, offer, self._cpu.admission(offer.test))

    def use(self, worker: GpuWorker) -> Run | None:
        """A test for a GPU worker that has no group to go on with; None where it gets none."""
        rest = worker.unit.tests
        # It goes on with its group, unless models keep the VRAM for that.
        if rest and not self.queue.has_chain(worker.id) and self.may_wait(worker, rest[0]):
            return None
        # CPU workers are for these tests, where they have collected them.
        offer = self.queue.offer(
            worker.id, lambda *tests: worker.knows(*tests) and not self._cpu.could_run(*tests)
        )
        if offer is None:
            return None
        self._gpu.help_out(worker, [offer.test])
        return self._run(worker.id, offer)

    def stop(self) -> Iterator[Action]:
        """Take back the tests that wait in workers: the run ends."""
        for worker in list(self.queue.gate):
            yield EmptyCaches(worker, withdraw=True)

    def _run(self, worker: str, offer: Offer, known: Admission = Admission()) -> Run:  # noqa: B008
        """`known`: what the worker's pool has to say of the test."""
        waited = known.waited + (self._waited(offer.test) if offer.admitted else 0.0)
        admission = known._replace(waited=waited, refusal=offer.refusal or known.refusal)
        admissions = {} if admission == Admission() else {offer.test: admission}
        return Run(worker, (offer.test,), admissions, admitted=offer.admitted)
