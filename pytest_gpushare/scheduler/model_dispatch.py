"""Where tests that use a model meet the workers: CPU workers where there are any, else GPU workers.

A test that uses a model needs no VRAM of its own. It is sent only to a worker that has nothing to
do, or that asks for what follows, so that it starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.phases import AFTER, BEFORE, too_large
from pytest_gpushare.scheduler.queue import GROUPED, Unit, in_units
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Admit,
    CloseModel,
    EmptyCaches,
    Job,
    Note,
    OpenModel,
    Run,
)
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpushare.scheduler.accounts import DeviceLedger
    from pytest_gpushare.scheduler.cpu_pool import CpuPool, CpuWorker
    from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
    from pytest_gpushare.scheduler.model_queue import ModelQueue, Offer
    from pytest_gpushare.scheduler.pressure import Reclaiming
    from pytest_gpushare.scheduler.routing import Fallback, Routes


IDLE = 1.0
"""Seconds for which no worker runs anything before a model makes way that nobody can use."""

WORTH_A_NOTE = 0.5
"""Seconds."""

DRAINED = 2.0
"""Seconds after the last GPU test for which VRAM that comes back late is waited for."""


class ModelDispatch:
    """Hands out the tests of a `ModelQueue`."""

    def __init__(
        self,
        models: ModelQueue,
        jobs: Sequence[Job],
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
        self._asked: dict[int | None, float] = {}
        """Group -> since when the first of its tests waits for the model."""
        self._due: dict[int, float] = {}
        """Group -> since when its model waits for VRAM."""
        self._since = 0.0
        self._progress: list[int] = []
        self._drained_at: float | None = None
        """When the last GPU test was over that ran where a model is to be loaded."""
        self._jobs, self._gpu, self._cpu, self._fallback = jobs, gpu, cpu, fallback
        cpu.divert = self._take_over

    def take(self, found: Routes) -> Routes:
        """Take the tests that use a model out of the routes; the others stay as they are."""
        cpu = self._take_unmarked(found.cpu)
        gpu = self._take_unmarked(found.gpu)
        both = [test for test in gpu if self._jobs[test].model is not None]
        refused = {test: text for test in both if (text := self._too_large(test))}
        if refused:
            found = found._replace(refused={**found.refused, **refused})
            both = [test for test in both if test not in refused]
            gpu = [test for test in gpu if test not in refused]
        for test in both:
            self._limit_unknown(test)
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

    def _limit_unknown(self, test: int) -> None:
        """A need that nobody knows must leave room for the model, and for other contexts."""
        model = self._jobs[test].model
        workers = list(self._gpu.workers.values())
        for ledger, size in self._devices_of(model) if model is not None else ():
            others = sum(ledger.full.uuid in worker.devices for worker in workers) - 1
            rest = ledger.full.budget - size - max(0, others) * ledger.full.context
            self._gpu.limit_unknown(test, rest)

    def _too_large(self, test: int) -> str:
        model, need = self._jobs[test].model, self._gpu.need(test).vram
        if model is None or need is None:
            return ""
        facts = self.queue.facts(model)
        budgets = [
            (self._gpu.ledgers[uuid].full.budget, size)
            for uuid, size in facts.reservations.items()
            if uuid in self._gpu.ledgers
        ]
        if not budgets or len(self._gpu.ledgers) > len(budgets):
            return ""
        budget, size = max(budgets)
        return too_large(need, size, facts.name, budget)

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
            waited = self._gpu.at - self._asked.pop(self._jobs[admitted.test].model, self._gpu.at)
            yield Admit(id_, admitted.test, Admission(refusal=admitted.refusal, waited=waited))
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
        self.has_begun = True
        gpu, queue = self._gpu, self.queue
        bound = [worker.bound for worker in gpu.waiting.values() if worker.bound is not None]
        is_idle = self._has_been_idle()
        may_open = queue.phase != AFTER or is_idle or not self._gpu_tests_are_left()
        actions: list[Action] = []
        for action in queue.actions(bound, is_idle=is_idle, may_open=may_open):
            if isinstance(action, OpenModel):
                self._asked[action.group] = gpu.at
            if isinstance(action, OpenModel) and queue.facts(action.group).reservations:
                # Until it is known that the turn takes a while.
                self._hold(action.group)
                actions.append(action._replace(turn_only=True))
            elif isinstance(action, CloseModel):
                has_room = bool(queue.facts(action.group).reservations)
                more = queue.waits or self._gpu_tests_are_left()
                actions.append(action._replace(makes_room=has_room and more))
            else:
                actions.append(action)
        for group in list(self._due):
            if self._has_room(group):
                self._note_due(group, 0)
                waited = gpu.at - self._due.pop(group)
                if waited >= WORTH_A_NOTE:
                    name = queue.facts(group).name
                    text = f"{name} waited {waited:.1f} s for VRAM before it was loaded"
                    actions.append(Note("ollama-waited", text, {"waited_s": round(waited, 3)}))
                actions.append(OpenModel(group))
            elif text := self._lacks_leased(group):
                actions.append(Note("ollama-not-loaded", text))
                self.not_opened(group, "fail", text)
            else:
                actions += self._make_room(group)
        if any(ledger.holds for ledger in gpu.ledgers.values()):
            actions += self._withdraw()
        return actions

    def _has_been_idle(self) -> bool:
        """Whether all have been idle for a moment, so that idle workers have given VRAM back."""
        if not self._is_idle():
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = self._gpu.at
        return self._gpu.at - self._idle_since >= IDLE or not self._gpu.workers

    def _withdraw(self) -> Iterator[Action]:
        """Take back tests that wait in workers for VRAM that a model has for long."""
        gpu = self._gpu
        starves = not any(gpu.idle.values()) and self.queue.has_offers
        for worker in list(gpu.waiting.values()):
            test = worker.bound
            if test is None or not worker.is_between_tests or self.may_wait(worker, test):
                continue
            if starves or gpu.bytes_for(worker, test) > gpu.ledgers[worker.device].capacity.budget:
                yield self._reclaiming.ask(worker, withdraw=True)

    # --- VRAM for models ---

    @property
    def is_due(self) -> bool:
        """Whether a model waits for VRAM, so that the devices are to be read."""
        since = self._idle_since
        waits = bool(self._due) or (since is not None and self._gpu.at - since < 2 * IDLE)
        return waits and bool(self._gpu.workers or self._cpu.workers)

    def has_turn(self, group: int, *, waits: bool) -> None:
        """VRAM is what the model waits for now; `waits`: not yet, GPU tests go on meanwhile."""
        if waits:
            self.release(group)
            return
        self._hold(group)
        self._due[group] = self._since = self._gpu.at
        self._drained_at = None

    def began(self, worker: GpuWorker, test: int) -> None:
        """A test was admitted; one whose model is missing is refused."""
        queue, refusals = self.queue, self._gpu.refusals
        refusal = queue.refusal_of(test)
        if refusal is not None:
            refusals.setdefault(test, refusal)
        if test in refusals:
            # It is reported without being run, and takes no place.
            queue.forget([test])
        else:
            queue.begin(worker.id, test)

    def allows(self, worker: str, test: int) -> bool:
        """Whether a test may start as far as models go."""
        queue = self.queue
        if test in self._gpu.refusals:
            return True
        if queue.phase == BEFORE and self._jobs[test].model is None and queue.is_active:
            return False
        return queue.may_start(worker, test)

    def may_wait(self, worker: GpuWorker, test: int) -> bool:
        """Whether a test may wait in a worker: not where models keep its VRAM for long."""
        gpu, queue = self._gpu, self.queue
        if test in gpu.refusals:
            return True
        if queue.phase == BEFORE and self._jobs[test].model is None and queue.is_active:
            return False
        need = gpu.bytes_for(worker, test)
        devices = gpu.devices(worker, gpu.need(test).devices)
        held = [gpu.ledgers[device] for device in devices if gpu.ledgers[device].holds]
        if held and queue.waits and not self._cpu.workers:
            # The worker is for the tests of the model, until this one fits.
            return False
        return all(need <= ledger.capacity.budget for ledger in held)

    def release(self, group: int) -> None:
        """Nothing is kept for this model any more."""
        self._due.pop(group, None)
        self._note_due(group, 0)
        self._idle_since = None
        for uuid in self.queue.facts(group).reservations:
            if uuid in self._gpu.ledgers:
                self._gpu.ledgers[uuid].hold(0)
        self._gpu.note_change()

    def opened(self, group: int, size: int | None = None) -> None:
        """A model is loaded, and takes so many bytes, where that is known."""
        self.queue.opened(group)
        self._idle_since = None
        devices = self._devices_of(group)
        if size is not None and len(devices) == 1:
            ledger, predicted = devices[0]
            ledger.hold(ledger.full.resident + min(size, predicted))
        self._gpu.note_change()

    def not_opened(self, group: int, outcome: str, reason: str) -> None:
        """The model of this group cannot be loaded; `outcome` is `fail` or `skip`."""
        self.queue.not_opened(group, outcome, reason)
        self.release(group)

    def closed(self, group: int) -> None:
        """Nothing keeps the model of this group any more."""
        self.queue.closed(group)
        self.release(group)

    def limit(self, group: int, places: int) -> int:
        """Let so many tests of this group be under way at once. Returns how many are."""
        if self.queue.limit(group, places):
            self._gpu.note_change()
        return self.queue.taken(group)

    def _note_due(self, group: int, size: int | None = None) -> None:
        for ledger, all_of_it in self._devices_of(group):
            ledger.due = all_of_it if size is None else size

    def _lacks_leased(self, group: int) -> str:
        """Why a model is not waited for any more: others have what it takes, and keep it."""
        others = [ledger.reading.others for ledger, _ in self._devices_of(group)]
        progress = [each.progress for each in others]
        if progress != self._progress:
            self._progress, self._since = progress, self._gpu.at
        if (
            not any(each.lent for each in others)
            or self._gpu.at - self._since < self.queue.patience
        ):
            return ""
        facts, who = self.queue.facts(group), "; ".join(each.names for each in others if each.names)
        size = format_gb(max(facts.reservations.values()))
        waited = self._gpu.at - self._due[group]
        return (
            f"{facts.name} needs {size} of VRAM, which other sessions have leased: waited "
            f"{waited:.0f} s: {who}"
        )

    def _hold(self, group: int) -> None:
        self._note_due(group)
        for uuid, size in self.queue.facts(group).reservations.items():
            ledger = self._gpu.ledgers.get(uuid)
            if ledger is not None:
                # What is resident now may be a model of ours that is being unloaded.
                ledger.hold(ledger.full.resident + size)
        self._gpu.note_change()

    def _devices_of(self, group: int) -> list[tuple[DeviceLedger, int]]:
        found = self.queue.facts(group).reservations.items()
        ledgers = self._gpu.ledgers
        return [(ledgers[uuid], size) for uuid, size in found if uuid in ledgers]

    def _has_room(self, group: int) -> bool:
        """Whether the model can be loaded now: the server takes the device with most VRAM free."""
        devices = self._devices_of(group)
        for ledger, size in devices:
            free, claimed = ledger.reading.free, ledger.reading.others.claimed
            if free is None and ledger.committed <= ledger.capacity.budget - claimed:
                return True
            if free is not None and free - ledger.outstanding - claimed >= size:
                return True
        if not devices:
            return True
        if any(ledger.running or ledger.reading.others.lent for ledger, _ in devices):
            self._drained_at = None
            return False
        if self._drained_at is None:
            self._drained_at = self._gpu.at
        # Nothing of ours is in the way any more: the server decides, as for any request.
        return self._gpu.at - self._drained_at > DRAINED

    def _make_room(self, group: int) -> Iterator[Action]:
        """Take what idle workers hold."""
        for ledger, _ in self._devices_of(group):
            for name in ledger.accounts:
                worker = self._gpu.workers.get(name)
                if worker is None or not worker.is_between_tests:
                    continue
                if not ledger.running and worker.emptied < 2:
                    yield self._reclaiming.ask(worker, withdraw=worker.emptied == 1)

    def _gpu_tests_are_left(self) -> bool:
        gpu = self._gpu
        return bool(gpu.pending.count) or any(
            worker.bound is not None
            or (worker.unit is not None and worker.unit.tests)
            or any(test not in gpu.helped for test in worker.sent)
            for worker in gpu.workers.values()
        )

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
        unit = Unit([test])
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
        offer = offer._replace(refusal=offer.refusal or refusal)
        return self._run(worker.worker.id, offer, note)

    def use(self, worker: GpuWorker) -> Run | None:
        """A test for a GPU worker that has no group to go on with; None where it gets none."""
        unit = worker.unit
        has_group = unit is not None and bool(unit.tests) and not self.queue.has_chain(worker.id)
        # It goes on with its group, unless models keep the VRAM for that.
        if has_group and unit is not None and self.may_wait(worker, unit.tests[0]):
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
        return self._run(worker.id, offer)

    def stop(self) -> Iterator[Action]:
        """Take back the tests that wait in workers: the run ends."""
        for worker in list(self.queue.gate):
            yield EmptyCaches(worker, withdraw=True)

    def _run(self, worker: str, offer: Offer, note: str = "") -> Run:
        waited, model = 0.0, self._jobs[offer.test].model
        if model in self._asked and offer.admitted:
            # The first test of a model waits for it; those behind it wait for that one.
            waited = self._gpu.at - self._asked.pop(model)
        admissions = {}
        if note or offer.refusal is not None or waited:
            admissions = {offer.test: Admission(note=note, refusal=offer.refusal, waited=waited)}
        return Run(worker, (offer.test,), admissions, admitted=offer.admitted)
