"""Where tests that use a model meet the workers: CPU workers where there are any, else GPU workers.

A test that uses a model needs no VRAM of its own. It is sent only to a worker that has nothing to
do, or that asks for what follows, so that it starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.queue import GROUPED, Unit, in_units
from pytest_gpushare.scheduler.types import Action, Admission, Admit, EmptyCaches, Job, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpushare.scheduler.cpu_pool import CpuPool, CpuWorker
    from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
    from pytest_gpushare.scheduler.model_queue import ModelQueue, Offer
    from pytest_gpushare.scheduler.routing import Fallback, Routes


class ModelDispatch:
    """Hands out the tests of a `ModelQueue`."""

    def __init__(
        self,
        models: ModelQueue,
        jobs: Sequence[Job],
        gpu: GpuPool,
        cpu: CpuPool,
        fallback: Fallback,
    ) -> None:
        self.queue = models
        self._jobs, self._gpu, self._cpu, self._fallback = jobs, gpu, cpu, fallback
        cpu.divert = self._take_over

    def take(self, found: Routes) -> Routes:
        """Take the tests that use a model out of the routes; the others stay as they are."""
        cpu = self._take_unmarked(found.cpu)
        gpu = self._take_unmarked(found.gpu)
        both = [test for test in gpu if self._jobs[test].model is not None]
        if self._gpu.policy.dist in GROUPED:
            self.queue.expect(both)
        else:
            self.queue.hold(both)
            gpu = [test for test in gpu if self._jobs[test].model is None]
        return found._replace(cpu=cpu, gpu=gpu)

    def drop_orphans(self) -> None:
        """Drop the tests that no worker which is left has collected."""
        gpu, cpu = self._gpu, self._cpu

        def could_run(test: int) -> bool:
            return cpu.could_run(test) or any(
                worker.knows(test) and not worker.ending for worker in gpu.workers.values()
            )

        for test in self.queue.orphans(could_run):
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
        if not self.queue.owns(test):
            if self._jobs[test].model is not None:
                self.queue.expect([test])
            return False
        self.queue.back([test])
        return True

    def actions(self) -> Iterator[Action]:
        """What is to be done now for these tests, on CPU workers and beside them."""
        queue, cpu = self.queue, self._cpu
        for test in queue.release():
            self._release(test)
        for id_, admitted in queue.open_gate():
            yield Admit(id_, admitted.test, Admission(refusal=admitted.refusal))
        wanted = queue.workers_wanted
        for number, worker in enumerate(cpu.workers.values()):
            worker.is_shallow = number < wanted
            worker.is_taken = queue.has_chain(worker.worker.id)
            if not worker.ending and (not worker.queue or worker.asks):
                offer = queue.offer(worker.worker.id, worker.knows)
                if offer is not None:
                    yield self._to_cpu(worker, offer)

    def loads(self) -> list[Action]:
        """The models to load, and those that nothing uses any more: after all was handed out."""
        bound = [worker.bound for worker in self._gpu.waiting.values() if worker.bound is not None]
        return self.queue.actions(bound, is_idle=self._is_idle())

    def _is_idle(self) -> bool:
        gate = self.queue.gate
        sent = [(w.id, w.sent) for w in self._gpu.workers.values() if w.emptying is None]
        sent += [(w.worker.id, w.queue) for w in self._cpu.workers.values()]
        is_complete = len(sent) == len(self._gpu.workers) + len(self._cpu.workers)
        return (
            bool(sent)
            and is_complete
            and all(
                not has or (len(has) == 1 and gate.get(worker) == has[0]) for worker, has in sent
            )
        )

    def _release(self, test: int) -> None:
        refusal = self.queue.refusal_of(test)
        if refusal is not None:
            self._gpu.refuse(test, *refusal)
        unit = Unit([test], self._jobs[test].group)
        if self._gpu.anybody_could(unit):
            self._gpu.pending.back(unit)
            self._gpu.note_change()
        else:
            self._fallback.settle(test, "no GPU worker is left that could run it")

    def _to_cpu(self, worker: CpuWorker, offer: Offer) -> Run:
        worker.asks = False
        worker.queue.append(offer.test)
        worker.is_taken = self.queue.has_chain(worker.worker.id)
        note = self._cpu.notes.pop(offer.test, "")
        refusal = self._cpu.refusals.pop(offer.test, None)
        return _run(worker.worker.id, offer._replace(refusal=offer.refusal or refusal), note)

    def use(self, worker: GpuWorker) -> Run | None:
        """A test for a GPU worker that has no group to go on with; None where it gets none."""
        if worker.unit is not None and worker.unit.tests and not self.queue.has_chain(worker.id):
            return None
        # CPU workers are for these tests, where they have collected them.
        offer = self.queue.offer(
            worker.id, lambda test: worker.knows(test) and not self._cpu.could_run(test)
        )
        if offer is None:
            return None
        gpu = self._gpu
        worker.help_out([self._jobs[offer.test].group])
        gpu.helped.add(offer.test)
        worker.sent.append(offer.test)
        worker.deadline = None
        gpu.refresh(worker)
        return _run(worker.id, offer)

    def stop(self) -> Iterator[Action]:
        """Take back the tests that wait in workers: the run ends."""
        for worker in list(self.queue.gate):
            yield EmptyCaches(worker, withdraw=True)


def _run(worker: str, offer: Offer, note: str = "") -> Run:
    admissions = {}
    if note or offer.refusal is not None:
        admissions = {offer.test: Admission(note=note, refusal=offer.refusal)}
    return Run(worker, (offer.test,), admissions, admitted=offer.admitted)
