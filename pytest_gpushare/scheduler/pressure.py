"""What is done for a test that waits: VRAM is freed, and others are waited for, within limits.

So is a running test that wants more VRAM than it was admitted with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pytest_gpushare.scheduler.accounts import DeviceLedger
from pytest_gpushare.scheduler.backfilling import Backfilling
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.types import Action, EmptyCaches, Note, Raised, Shutdown
from pytest_gpushare.units import MB, format_gb

WORTH_EMPTYING = 64 * MB
"""Bytes below which emptying caches is not worth the time."""
EMPTYING_TIMEOUT = 10.0
"""Seconds after which a worker that does not answer counts as having emptied its caches."""
AGAIN = 0.25
"""Seconds after which devices are looked at on which nothing has changed."""
AGAIN_WHILE_BUSY = 2.0
"""The same where a test runs: when that is over, something has changed."""
PATIENCE = 0.5
"""Seconds for which VRAM may be missing before an event reports it."""


class Waiter(NamedTuple):
    """A test that waits for a device, and the worker that would run it."""

    worker: GpuWorker
    test: int


class Reclaiming:
    """Takes from workers between two tests what they hold, the gentlest way first."""

    def __init__(self, pool: GpuPool) -> None:
        self._pool = pool

    def is_under_way(self, ledger: DeviceLedger) -> bool:
        """Whether a worker gives something back at this moment."""
        workers = self._pool.workers_on(ledger)
        return any(worker.emptying is not None or worker.ending for worker in workers)

    def reclaim(self, ledger: DeviceLedger, waiter: Waiter, need: int) -> list[Action]:
        """Have neighbours empty their caches, give up fixtures or end, as far as it helps."""
        if self.is_under_way(ledger):
            return []
        worker = waiter.worker
        busy = ledger.runs_beside(worker.id)
        short = need - ledger.limit_by_budget(worker.id)
        asked = self.empty(ledger, worker, short, busy)
        if asked:
            return asked
        short_for_good = need - ledger.most(worker.id)
        if busy and short_for_good <= 0:
            return []
        if not busy:
            asked = self._ask(ledger, worker, short, busy=False, withdraw=True)
            if asked:
                return asked
        return self._end(ledger, waiter, short_for_good if busy else short)

    def empty(
        self, ledger: DeviceLedger, worker: GpuWorker, short: int, busy: bool
    ) -> list[Action]:
        """Have neighbours between two tests give back what they retain, where that helps."""
        if self._pool.policy.empty_caches == "never":
            return []
        return self._ask(ledger, worker, short, busy=busy, withdraw=False)

    def _ask(
        self, ledger: DeviceLedger, worker: GpuWorker, short: int, *, busy: bool, withdraw: bool
    ) -> list[Action]:
        pool = self._pool
        found = [
            (size, other)
            for size, name in ledger.retained(0 if withdraw else WORTH_EMPTYING)
            if (other := pool.workers[name]) is not worker
            and other.is_between_tests
            and other.emptied <= withdraw
            and (other.bound is not None or not withdraw)
        ]
        if not found or (busy and sum(size for size, _ in found) < short):
            return []
        asked: list[Action] = []
        for size, other in sorted(found, key=lambda pair: -pair[0]):
            if short <= 0:
                break
            short -= size
            asked.append(self.ask(other, withdraw=withdraw))
        return asked

    def ask(self, other: GpuWorker, *, withdraw: bool) -> EmptyCaches:
        """Have this worker empty its caches; with `withdraw` its bound test is pending again."""
        pool = self._pool
        other.emptying, other.emptied = pool.at, 1 + withdraw
        if withdraw:
            pool.unbind(other)
        pool.refresh(other)
        return EmptyCaches(other.id, withdraw)

    def release(self, ledger: DeviceLedger, waiter: Waiter | None) -> list[Action]:
        """Free what workers keep that this session can do without, as other sessions are there.

        For an older session it does without all workers but one; for any other without those for
        which no test is left. For a test of its own the worker stays that would run it.
        """
        pool, accounts = self._pool, ledger.accounts
        staying = pool.staying(ledger)
        others = ledger.reading.others
        owed = others.owed or others.lacks
        is_done = not pool.pending.count and not any(w.unit.tests for w in staying)
        actions: list[Action] = []
        for other in sorted(staying, key=lambda worker: -accounts[worker.id].committed):
            size = accounts[other.id].committed
            if size <= 0 or not (owed > 0 or is_done):
                break
            if not others.owed and waiter is not None and other is waiter.worker:
                continue
            if other.is_idle and len(staying) > 1:
                staying.remove(other)
                owed -= size
                why = f"ended: other sessions wait for the {format_gb(size)} it kept"
                actions += self._end_one(other, size, why)
            elif owed > 0 and other.bound is not None and other.is_between_tests:
                # It keeps fixtures for a test that waits. When it is idle it can be ended, unless
                # it is the last one: that gives up its fixtures alone.
                is_last = len(staying) == 1
                if other.emptied < 2 and (not is_last or size > ledger.capacity.context):
                    other.leaves = not is_last
                    owed -= size
                    actions.append(self.ask(other, withdraw=True))
        return actions

    def _end(self, ledger: DeviceLedger, waiter: Waiter, short: int) -> list[Action]:
        accounts, name = ledger.accounts, self._pool.jobs[waiter.test].nodeid
        workers = self._pool.workers_on(ledger)
        idle = [each for each in workers if each.is_idle and each is not waiter.worker]
        actions: list[Action] = []
        for other in sorted(idle, key=lambda worker: -accounts[worker.id].committed):
            size = accounts[other.id].committed
            if short <= 0 or size <= 0:
                break
            short -= size
            why = f"ended: its {format_gb(size)} were in the way of {name}"
            actions += self._end_one(other, size, why)
        return actions

    def _end_one(self, worker: GpuWorker, size: int, why: str) -> list[Action]:
        worker.ending = True
        self._pool.refresh(worker)
        facts: dict[str, int | float | str] = {"worker": worker.id, "bytes": size}
        return [Shutdown(worker.id), Note("worker-ended", f"{worker.id} {why}", facts)]

    def raise_needs(self) -> Iterator[Action]:
        """Grant running tests that want more VRAM what is there; have VRAM freed for the rest."""
        pool = self._pool
        for name, more in list(pool.raising.items()):
            worker = pool.workers[name]
            ledger = pool.ledgers[worker.device]
            size, left = more.size, ledger.limit(worker.id)
            there = max(left, ledger.accounts[worker.id].committed)
            if more.takes_less:
                size = min(size, there)
            need = max(size, self._need_of_what_follows(worker))
            if need <= there:
                ledger.start(worker.id, need)
                del pool.raising[worker.id]
                pool.note_change(worker.device)
                yield Raised(worker.id, more.number, True, size)
            elif more.size > ledger.budget:
                del pool.raising[worker.id]
                text = f"the largest budget is {format_gb(ledger.budget)} ({ledger.capacity.label})"
                yield Raised(worker.id, more.number, False, text=text)
            else:
                if not more.is_noted:
                    pool.raising[name] = more._replace(is_noted=True)
                    there_is = f"{format_gb(max(0, left))} is left for it"
                    text = f"{there_is} on {ledger.capacity.label}{held_by(ledger)}"
                    yield Raised(worker.id, more.number, False, is_final=False, text=text)
                yield from self.reclaim(ledger, Waiter(worker, worker.sent[0]), more.size)

    def _need_of_what_follows(self, worker: GpuWorker) -> int:
        """What the tests need that the worker was sent, or that take the running one's place."""
        pool, tests = self._pool, list(worker.sent)
        if worker.reserved and worker.bound is not None:
            tests.append(worker.bound)
        needs = [pool.live_need(worker, t, worker.device) for t in tests if t not in pool.helped]
        return max(needs, default=0)


@dataclass
class Blocked:
    """A device on which nothing starts, as others hold its VRAM."""

    since: float
    counts_from: float
    """When the time began that `Policy.pressure_timeout` limits: it begins again with each progress
    of another session, as long as the VRAM that the session leases is what is missing."""
    progress: int = 0
    noted: bool = False
    noted_late: bool = False
    given_up: bool = False


class Pressure:
    """Looks at what does not fit, and why."""

    def __init__(self, pool: GpuPool, backfilling: Backfilling) -> None:
        self._pool = pool
        self._backfilling = backfilling
        self.reclaiming = Reclaiming(pool)
        self._blocked: dict[str, Blocked] = {}
        self._released: dict[str, tuple[int, float]] = {}
        """Device -> the VRAM that tests gave back last, in bytes, and when."""
        self.due_at = float("-inf")
        """When every device is to be looked at: no event reports what time has changed."""

    def released(self, device: str, size: int) -> None:
        """A test or a process gave back so many bytes."""
        if size > 0:
            self._released[device] = size, self._pool.at

    def began(self, worker: str, tests: Sequence[int]) -> Iterator[Note]:
        """Tests began in this worker: there is VRAM on its devices again."""
        if not self._blocked:
            return
        pool = self._pool
        gpu_worker = pool.workers[worker]
        for test in tests:
            if test in pool.helped or test in pool.refusals or test in pool.forced:
                continue
            for device in pool.devices(gpu_worker, test):
                blocked = self._blocked.pop(device, None)
                if blocked is not None and blocked.noted:
                    label = pool.ledgers[device].capacity.label
                    waited = pool.at - blocked.since
                    text = f"{label}: there is VRAM for tests again, after {waited:.0f} s"
                    yield Note(
                        "pressure-over", text, {"device": device, "waited_s": round(waited, 3)}
                    )

    def look_everywhere(self) -> None:
        """Note what time may have changed."""
        pool = self._pool
        self.due_at = pool.at + AGAIN
        for worker in pool.workers.values():
            if worker.emptying is not None and pool.at - worker.emptying > EMPTYING_TIMEOUT:
                worker.emptying = None
                pool.refresh(worker)
        for device, idle in pool.idle.items():
            pause = AGAIN_WHILE_BUSY if pool.ledgers[device].running else AGAIN
            waits = idle or self._backfilling.head(device) is not None
            if waits and pool.at - pool.filled[device] >= pause:
                pool.changed.add(device)

    def look(self, devices: Sequence[str], *, at_all: bool) -> list[Action]:
        """What is to be done for the tests that wait on these devices, or on all of them."""
        pool = self._pool
        actions: list[Action] = []
        for device in sorted(pool.idle) if at_all else devices:
            others = pool.ledgers[device].reading.others
            if others.are_waiting or others.lacks:
                actions += self.reclaiming.release(pool.ledgers[device], self.first_waiter(device))
            if pool.ledgers[device].running and not at_all:
                # While a test runs there, to wait for it is the rule: now and then will do.
                continue
            waiter = self.first_waiter(device)
            if waiter is not None:
                actions += self._make_room_for(waiter)
        return actions

    def first_waiter(self, device: str) -> Waiter | None:
        """The test for which something is done on this device.

        While a model is kept there, one that uses it: the others have its VRAM when it is gone.
        """
        holds, first = self._pool.ledgers[device].has_model_reservation, None
        for waiter in self._waiters(device):
            if not holds or self._pool.jobs[waiter.test].model is not None:
                return waiter
            first = first or waiter
        return first

    def _waiters(self, device: str) -> Iterator[Waiter]:
        pool = self._pool
        for head in self._backfilling.waiting(device):
            if head.sent or head.emptying is not None or head.bound is None:
                return
            if head.waiting_since is None:
                head.waiting_since = pool.at
            yield Waiter(head, head.bound)
        idle = list(pool.idle[device].values())
        if len(idle) > 1:
            accounts = pool.ledgers[device].accounts
            idle.sort(key=lambda worker: -accounts[worker.id].committed)
        for worker in idle:
            unit = pool.first_for(worker, unbarred=True) or pool.first_for(worker)
            if unit is not None:
                if unit.since is None:
                    unit.since = pool.at
                yield Waiter(worker, unit.tests[0])

    def gave_up(self, worker: GpuWorker, test: int) -> tuple[str, int] | None:
        """Device and bytes left there, where the test has waited long enough for others' VRAM."""
        pool = self._pool
        for device in pool.devices(worker, test):
            blocked, ledger = self._blocked.get(device), pool.ledgers[device]
            live, need = ledger.limit_by_free_vram(worker.id), pool.live_need(worker, test, device)
            if blocked is not None and blocked.given_up and live is not None and need > live:
                return device, max(0, live - ledger.accounts[worker.id].left_behind)
        return None

    @property
    def has_given_up(self) -> bool:
        """Whether tests wait no longer on some device."""
        blocked = self._blocked
        return bool(blocked) and any(one.given_up for one in blocked.values())

    def _make_room_for(self, waiter: Waiter) -> list[Action]:
        pool, reclaiming, worker = self._pool, self.reclaiming, waiter.worker
        need = pool.bytes_for(worker, waiter.test)
        if waiter.test in pool.forced:
            return []
        for device in pool.devices(worker, waiter.test):
            ledger = pool.ledgers[device]
            if ledger.has_model_reservation and need > ledger.capacity.budget:
                # The tests of a model have it for as long as they run.
                return []
            if ledger.reading.others.is_asked:
                # More was asked for on that host: the answer may bring what is missing.
                return []
            if need > ledger.limit_by_budget(worker.id):
                return reclaiming.reclaim(ledger, waiter, need)
            live = ledger.limit_by_free_vram(worker.id)
            whole = pool.live_need(worker, waiter.test, device)
            if live is not None and whole > live:
                short, busy = whole - live, ledger.runs_beside(worker.id)
                asked = reclaiming.empty(ledger, worker, short, busy)
                is_on_its_way = reclaiming.is_under_way(ledger) or (
                    bool(ledger.running) and ledger.fits_alone(whole)
                )
                # A test without a model has the VRAM when the model is gone.
                comes_back = ledger.has_model_reservation and pool.jobs[waiter.test].model is None
                if asked or is_on_its_way or comes_back:
                    return asked
                return list(self._wait_or_give_up(ledger, waiter.test, need, live, whole - need))
            if pool.need(waiter.test).exclusive and ledger.runs_beside(worker.id):
                return []
        return []

    def _wait_or_give_up(
        self, ledger: DeviceLedger, test: int, need: int, live: int, left_behind: int
    ) -> Iterator[Action]:
        """VRAM that should be free is not: it comes back late, or others took it.

        `left_behind`: bytes that processes hold which earlier tests of the worker started.
        """
        live -= left_behind
        pool, capacity = self._pool, ledger.capacity
        blocked = self._blocked.setdefault(capacity.uuid, Blocked(pool.at, pool.at))
        waited = pool.at - blocked.since
        size, released = self._released.get(capacity.uuid, (0, 0.0))
        patience = pool.policy.pressure_timeout
        limit = min(pool.policy.return_timeout, max(patience, PATIENCE))
        facts: dict[str, int | float | str] = {
            "device": capacity.uuid,
            "need": need,
            "left": max(0, live),
        }
        others = ledger.reading.others
        is_lent = need <= live + others.held_by_others
        if is_lent and blocked.progress != others.progress:
            blocked.progress, blocked.counts_from = others.progress, pool.at
        if need - live <= size and not (is_lent or left_behind):
            late = pool.at - released
            if late < limit:
                if waited >= 4 * PATIENCE and not blocked.noted_late:
                    blocked.noted_late = True
                    text = (
                        f"{capacity.label}: {format_gb(size)} that tests gave back is not free yet"
                    )
                    yield Note("late", text, facts)
                return
            if blocked.noted_late:
                blocked.noted_late = False
                back = format_gb(need - live)
                within = f"{limit:.2g} s{held_by(ledger)}"
                text = f"{capacity.label}: {back} did not come back within {within}"
                yield Note("late", text, facts)
        if waited >= PATIENCE and not blocked.noted:
            blocked.noted = True
            name = pool.jobs[test].nodeid
            text = (
                f"{capacity.label}: {name} needs {format_gb(need)} and waits: "
                f"{format_gb(max(0, live))} is left for tests{held_by(ledger)}"
            )
            yield Note("pressure", text, facts)
        if pool.at - blocked.counts_from >= patience:
            blocked.given_up = True


def held_by(ledger: DeviceLedger, mark: str = "; ") -> str:
    """Who else has VRAM of the device, as the end of a message."""
    found = {"held": ledger.reading.holders, "leased": ledger.reading.others.names}
    return "".join(f"{mark}{how} by {who}" for how, who in found.items() if who)
