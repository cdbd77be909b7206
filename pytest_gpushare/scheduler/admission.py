"""Which test each GPU worker gets: at once where it fits, else bound to the worker."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.backfilling import Backfilling
from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.queue import GROUPED, USUAL, Order, Unit
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Admit,
    Park,
    Recall,
    Run,
    Shutdown,
)

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.model_dispatch import ModelDispatch

TRIES = 64
"""Units that are looked at for one worker: those that it has not collected cost a try each."""

CHAIN = 0.1
"""Seconds for which tests are expected to last that a worker is sent at once."""

MOST_IN_CHAIN = 128

LONG_HELP = 1.0
"""From this duration on, in seconds, no GPU test is to wait for a worker that helps out."""


class Admitting:
    """Admits tests that wait, answers workers that ask, and serves idle ones."""

    def __init__(self, pool: GpuPool, cpu: CpuPool, backfilling: Backfilling) -> None:
        self._pool = pool
        self._cpu = cpu
        self._backfilling = backfilling
        self._may_split = pool.policy.dist not in GROUPED
        self._may_share = self._may_split and any(job.group for job in pool.jobs)
        self.models: ModelDispatch | None = None
        """The tests that use models of Ollama's; None: there are none."""

    # --- tests that wait for admission ---

    def admit_waiting(self, devices: Iterable[str]) -> list[Action]:
        """Admit the bound tests that fit now, in the order of binding."""
        pool = self._pool
        if not pool.waiting:
            return []
        changed = set(devices)
        actions: list[Action] = []
        for worker in list(pool.waiting.values()):
            test = worker.bound
            if test is None or changed.isdisjoint(worker.devices) or worker.emptying is not None:
                continue
            if self._fits(worker, test) and self._is_there(worker, test):
                since, worker.bound, worker.waiting_since = worker.waiting_since, None, None
                del pool.waiting[worker.id]
                actions.append(Admit(worker.id, test, self._assign(worker, test, since)))
                self._backfilling.admitted(worker, [test])
                pool.note_change(worker.device)
        return actions

    def _fits(self, worker: GpuWorker, test: int) -> bool:
        pool = self._pool
        if test in pool.refusals:
            # It is reported without being run, also where others have all VRAM.
            return True
        if self.models is not None and not self.models.allows(worker.id, test):
            return False
        if test in pool.forced:
            return not pool.has_neighbours(worker)
        return (
            pool.bytes_for(worker, test) <= pool.largest_need(worker, pool.kind_of(test))
            and self._backfilling.allows(worker, test)
            and self._fits_beside_what_was_left(worker, test)
        )

    def _fits_beside_what_was_left(self, worker: GpuWorker, test: int) -> bool:
        """Whether the test fits though processes of earlier tests of this worker live on."""
        pool = self._pool
        if not pool.has_left_behind(worker):
            return True
        for device in pool.devices(worker, test):
            live = pool.ledgers[device].limit_by_free_vram(worker.id)
            if live is not None and pool.live_need(worker, test, device) > live:
                return False
        return True

    # --- workers that ask ---

    def answer(self, worker: GpuWorker) -> list[Action]:
        """What follows for a worker that asks for its next test."""
        question, worker.question = worker.question, ""
        if self.models is not None and (run := self.models.use(worker)) is not None:
            return [run]
        self._set_aside(worker)
        # A test that has only begun may last: what it holds is not given back soon.
        lasts = self._pool.expected(worker.sent[-1]) if worker.sent else None
        reserves = question == "end" or (lasts is not None and lasts < CHAIN)
        unit = self._fitting(worker)
        if unit is not None and reserves:
            if self._is_there(worker, unit.tests[0]):
                return [self._begin(worker, unit, while_ending=question == "end")]
            return [self._bind(worker, unit, waits=False, reserved=True)]
        if unit is None:
            help_ = self._help(worker)
            if help_ is not None:
                return [help_]
            unit = None if self._is_in_the_way(worker) else self._first_though_unfitting(worker)
        if unit is not None and self._may_wait(worker, unit):
            return [self._bind(worker, unit, waits=reserves)]
        awaits = self._pool.policy.awaits_losses and not self._is_in_the_way(worker)
        if unit is not None or awaits or (self.models is not None and self.models.queue.waits):
            return [Park(worker.id)]
        worker.ending = True
        return [Shutdown(worker.id)]

    def _is_in_the_way(self, worker: GpuWorker) -> bool:
        """Whether it has made room for a test that waits, to no avail: it may have to end."""
        return worker.emptied == 2 and bool(self._pool.waiting)

    def _set_aside(self, worker: GpuWorker) -> None:
        """Put the rest of a worker's group back where a model keeps the VRAM for it."""
        unit = worker.unit
        if not unit.tests or not self._may_split or self._may_wait(worker, unit):
            return
        if not self._fits(worker, unit.tests[0]):
            worker.unit = Unit([])
            self._pool.pending.back(unit)

    def _may_wait(self, worker: GpuWorker, unit: Unit) -> bool:
        return self.models is None or self.models.may_wait(worker, unit.tests[0])

    def _is_there(self, worker: GpuWorker, test: int) -> bool:
        """Whether the VRAM for this test is there, also if nothing of the running one comes back.

        VRAM may come back late: then the test waits until it is free.
        """
        pool = self._pool
        if not worker.sent:
            return True
        need = pool.bytes_for(worker, test)
        for device in pool.devices(worker, test):
            ledger = pool.ledgers[device]
            live = ledger.limit_by_free_vram(worker.id)
            if live is not None and need > live - ledger.accounts[worker.id].present:
                return False
        return True

    def _due(self, worker: GpuWorker) -> Unit | None:
        """What comes before all else: the rest of its group, or a test for which others wait; not
        one that models keep from starting."""
        if worker.unit.tests:
            return worker.unit
        unit = self._backfilling.overdue()
        if unit is None or not self._may_wait(worker, unit):
            return None
        return unit if self._pool.may_begin(worker, unit) else None

    def _fitting(self, worker: GpuWorker) -> Unit | None:
        """What this worker can begin now."""
        due = self._due(worker)
        if due is not None:
            return due if self._fits(worker, due.tests[0]) else None
        unit = self._first(worker)
        if unit is None and self._may_share:
            unit = self._share(worker, must_fit=True)
        return unit

    def _first_though_unfitting(self, worker: GpuWorker) -> Unit | None:
        """What this worker has to do next, though it does not fit yet."""
        due = self._due(worker)
        if due is not None:
            return due
        unit = self._soonest(worker) or self._pool.first_for(worker)
        if unit is None and self._may_share:
            unit = self._share(worker, must_fit=False)
        return unit

    def _soonest(self, worker: GpuWorker) -> Unit | None:
        """The first pending unit in the order of those that will fit first."""
        pool, units = self._pool, self._pool.pending.units
        tree = pool.pending.trees.get(USUAL)
        if tree is None or pool.pending.again:
            return None
        for limit in self._backfilling.room_to_come(worker):
            for rank in islice(tree.up_to(limit), TRIES):
                if pool.may_begin(worker, units[rank]):
                    return units[rank]
        return None

    def _bind(self, worker: GpuWorker, unit: Unit, *, waits: bool, reserved: bool = False) -> Run:
        """Give the worker its next test, which waits there until it fits.

        `waits`: it may start as soon as it does; else when the running test is over. `reserved`:
        it fits already, and takes the place of the running one.
        """
        pool = self._pool
        test, since = self._take_next(worker, unit)
        worker.bound = worker.latest = test
        worker.waiting_since = since
        worker.reserved = reserved
        if reserved:
            pool.reserve(worker, test)
            self._backfilling.overtaken_by(unit)
        pool.idle[worker.device].pop(worker.id, None)
        if waits or not worker.sent:
            self.wait_for_admission(worker)
        return Run(worker.id, (test,), admitted=False)

    def wait_for_admission(self, worker: GpuWorker) -> None:
        """The bound test of this worker may start once it fits."""
        pool = self._pool
        if worker.reserved:
            # It has its place already: before all that wait.
            worker.reserved = False
            pool.waiting = {worker.id: worker, **pool.waiting}
        else:
            pool.waiting[worker.id] = worker
        pool.note_change(worker.device)

    # --- idle workers ---

    def fill(self, devices: Iterable[str]) -> list[Action]:
        """Something to do for each idle worker of these devices, where anything fits."""
        pool = self._pool
        idle: list[GpuWorker] = []
        for device in devices:
            pool.filled[device] = pool.at
            idle += pool.idle[device].values()
        if len(idle) > 1:
            # Who has begun a group goes first, then who has a context: a new one costs VRAM.
            idle.sort(key=lambda worker: (not worker.unit.tests, -self._held(worker)))
        actions: list[Action] = []
        failed: dict[str, int] = {}
        for worker in idle:
            if worker.leaves and pool.is_leaving(worker):
                continue
            if self.models is not None and (run := self.models.use(worker)) is not None:
                actions.append(run)
                continue
            self._set_aside(worker)
            if not worker.unit.tests and failed.get(worker.device, -1) >= self._held(worker):
                # A worker that holds no less than this one, and may do as much, found nothing.
                continue
            unit = self._fitting(worker)
            if unit is not None:
                failed.pop(worker.device, None)
                actions.append(self._begin(worker, unit))
                continue
            if self._is_in_the_way(worker):
                continue
            due = self._due(worker)
            if due is not None:
                if self._may_wait(worker, due):
                    actions.append(self._bind(worker, due, waits=True))
            elif self._stands_for_others(worker):
                failed[worker.device] = self._held(worker)
        return actions

    def _stands_for_others(self, worker: GpuWorker) -> bool:
        """Whether what it may not start no other idle worker of its device may."""
        return worker.collected is None and not worker.left_groups and not self._pool.has_several

    def _held(self, worker: GpuWorker) -> int:
        return self._pool.ledgers[worker.device].accounts[worker.id].committed

    # --- the choice ---

    def _first(self, worker: GpuWorker) -> Unit | None:
        """The first pending unit in the order that fits, and delays nobody who waits."""
        pool = self._pool
        pending = pool.pending
        for unit in pending.again:
            if pool.may_begin(worker, unit) and self._fits(worker, unit.tests[0]):
                return unit
        best = -1
        plain = worker.collected is None
        left_behind = pool.has_left_behind(worker)
        sure = pool.is_exact and not (pool.waiting or left_behind) and self.models is None
        # Where models decide too, what leaves room for others may have to wait for its model.
        is_cold = pool.cold and self.models is None
        for kind, tree in pending.trees.items():
            limit = pool.largest_need(worker, kind)
            start = self._first_modest(worker, tree, limit) if is_cold else 0
            for rank in islice(tree.up_to(limit, start), TRIES):
                if 0 <= best < rank:
                    break
                unit = pending.units[rank]
                # What fits now is a test that the worker could ever run, if it has collected it.
                known = (plain and not unit.key) or pool.may_begin(worker, unit)
                if known and (sure or self._fits(worker, unit.tests[0])):
                    best = rank
                    break
        return pending.units[best] if best >= 0 else None

    def _first_modest(self, worker: GpuWorker, tree: Order, limit: int) -> int:
        """Without known durations, from which rank on to look: the largest need that leaves room
        for the smallest pending tests on the other idle workers."""
        pool, first = self._pool, tree.first(limit)
        if first < pool.prefix:
            return max(first, 0)
        others = len(pool.idle[worker.device]) - (worker.id in pool.idle[worker.device])
        smallest = min(tree.smallest, pool.ledgers[worker.device].capacity.budget)
        modest = tree.first(limit - others * smallest)
        return modest if modest >= 0 else first

    def _share(self, worker: GpuWorker, *, must_fit: bool) -> Unit | None:
        """The second half of the group of which another worker has been given a part."""
        pool = self._pool
        begun = [
            other.unit
            for other in pool.workers.values()
            if other is not worker
            and len(other.unit.tests) > 1
            and not worker.goes_back(other.unit, other.unit.tests[-(len(other.unit.tests) // 2)])
            and pool.may_begin(worker, other.unit)
        ]
        whole = max(begun, key=lambda unit: len(unit.tests), default=None)
        if whole is None:
            return None
        half = len(whole.tests) // 2
        part = Unit(whole.tests[-half:], whole.key)
        if not worker.knows(part.tests[0]) or (must_fit and not self._fits(worker, part.tests[0])):
            return None
        del whole.tests[-half:]
        pool.pending.back(part)
        return part

    # --- what is sent ---

    def _take_next(self, worker: GpuWorker, unit: Unit) -> tuple[int, float | None]:
        """Give the worker the next test of a unit. Returns it, and since when it has waited."""
        if worker.unit is not unit:
            self._pool.pending.take(unit)
            worker.begin(unit)
        since, unit.since, unit.overtaken = unit.since, None, 0
        return unit.next(), since

    def _begin(self, worker: GpuWorker, unit: Unit, *, while_ending: bool = False) -> Run:
        """Send the next test of the unit, and more where these are short.

        `while_ending`: the running test of this worker is about to end.
        """
        pool = self._pool
        tests: list[int] = []
        admissions: dict[int, Admission] = {}
        seconds = 0.0
        most = self._most_in_chain(worker)
        next_unit: Unit | None = unit
        while next_unit is not None:
            test, since = self._take_next(worker, next_unit)
            admission = self._assign(worker, test, since, ahead=while_ending)
            tests.append(test)
            if admission != _PLAIN:
                admissions[test] = admission
            seconds += pool.expected(test) or CHAIN
            if seconds >= CHAIN or len(tests) >= most or admission.alone or pool.waiting:
                break
            next_unit = self._fitting(worker)
            if next_unit is not None:
                following = pool.expected(next_unit.tests[0])
                kind = pool.kind_of(next_unit.tests[0])
                if following is None or seconds + following > CHAIN or kind != USUAL:
                    next_unit = None
        self._backfilling.admitted(worker, tests)
        self._backfilling.overtaken_by(unit)
        if unit.tests and self._may_split:
            # Idle workers may share it.
            pool.note_change()
        is_short = seconds < CHAIN
        worker.deadline = pool.at + 2 * CHAIN if is_short and len(tests) > 1 else None
        # Early enough that the answer is there in time, also from a busy controller.
        ahead = 1 + len(tests) // 2 if is_short else 0
        return Run(worker.id, tuple(tests), admissions, ahead=ahead)

    def _most_in_chain(self, worker: GpuWorker) -> int:
        pool = self._pool
        left = pool.pending.count + len(worker.unit.tests)
        return min(MOST_IN_CHAIN, left // (2 * max(1, len(pool.workers))))

    def _assign(
        self, worker: GpuWorker, test: int, since: float | None, *, ahead: bool = False
    ) -> Admission:
        pool = self._pool
        waited = 0.0 if since is None else pool.at - since
        known, need = pool.need(test), pool.bytes_for(worker, test)
        note = ""
        if test in pool.forced:
            note = f"started without room on its GPU: {pool.forced[test]}"
        alone = pool.assign(worker, test, ahead=ahead)
        if self.models is not None:
            waited = max(waited, self.models.began(worker, test))
        worker.latest = test
        source = known.source if need else ""
        return Admission(need, source, waited, alone, note, pool.refusals.get(test))

    # --- CPU tests on GPU workers, and short tests behind a long one ---

    def _help(self, worker: GpuWorker) -> Run | None:
        """CPU tests for a GPU worker that has nothing to do."""
        pool, average = self._pool, self._cpu.average
        if pool.pending.count and (average is None or average > LONG_HELP):
            # A GPU test that could start soon would wait for this worker.
            return None
        tests = [] if worker.unit.tests else self._cpu.help(worker)
        if not tests:
            return None
        pool.help_out(worker, tests)
        return Run(worker.id, tuple(tests))

    def help_all(self) -> list[Run]:
        """CPU tests for the idle GPU workers."""
        idle = [worker for idle in self._pool.idle.values() for worker in idle.values()]
        return [run for worker in idle if (run := self._help(worker)) is not None]

    @property
    def next_deadline(self) -> float | None:
        """When short tests of some worker should long be over, and others may run them."""
        workers = self._pool.workers.values()
        found = [worker.deadline for worker in workers if worker.deadline is not None]
        return min(found, default=None) if len(workers) > 1 else None

    def recall(self) -> list[Recall]:
        """Take back short tests behind one that lasts, where others may run them."""
        pool = self._pool
        late: list[Recall] = []
        for worker in pool.workers.values() if len(pool.workers) > 1 else ():
            if worker.deadline is not None and worker.deadline <= pool.at and len(worker.sent) > 2:
                worker.deadline = None
                late.append(Recall(worker.id))
        return late


_PLAIN = Admission()
