"""Backfilling: which tests may start while another one waits for its admission.

A worker that asks for its next test and for which nothing fits gets one all the same: it is
*bound* to that worker and waits there. Tests that fit may start meanwhile, but only if that
delays none of those that wait: the one that has waited longest on a device has a reservation
(EASY backfilling). And a pending test that was overtaken often enough is bound too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.queue import Unit

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.accounts import DeviceLedger
    from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker

OVERTAKEN = 3
"""How many tests for each worker may overtake the one that is first in the order."""


class Backfilling:
    """The tests that wait for admission, and what may pass them."""

    def __init__(self, pool: GpuPool) -> None:
        self._pool = pool
        self._ends: dict[str, tuple[float, bool]] = {}
        """Worker -> when its tests should be over, and whether their durations are known."""

    def waiting(self, device: str) -> Iterator[GpuWorker]:
        """The workers whose next test waits for this device, in the order of binding.

        Not those whose test waits for a model.
        """
        for worker in self._pool.waiting.values():
            test = worker.bound
            if test is None or device not in self._pool.devices(worker, test):
                continue
            if not self._pool.bars(worker, test):
                yield worker

    def head(self, device: str) -> GpuWorker | None:
        """The worker whose next test has a reservation on this device."""
        if not self._pool.waiting:
            return None
        return next(self.waiting(device), None)

    def allows(self, worker: GpuWorker, test: int) -> bool:
        """Whether this test may start here, as far as those are concerned that wait."""
        pool = self._pool
        return not pool.waiting or all(
            self._allows_on(pool.ledgers[device], worker, test)
            for device in pool.devices(worker, test)
        )

    def _allows_on(self, ledger: DeviceLedger, worker: GpuWorker, test: int) -> bool:
        pool = self._pool
        need = pool.bytes_for(worker, test)
        left = ledger.capacity.budget
        running: list[tuple[float, int, bool]] = []
        for name, account in ledger.accounts.items():
            if name == worker.id:
                continue
            left -= account.committed
            if name in ledger.running:
                over, is_known = self._ends.get(name, (pool.at, False))
                freed = account.committed - ledger.floor(name)
                running.append((over, freed, is_known or pool.average is not None))
        # What uses a model that is kept goes first: the others have its VRAM when it is gone.
        goes_first = ledger.has_model_reservation and pool.jobs[test].model is not None
        for head in self.waiting(ledger.capacity.uuid):
            if head is worker:
                return need <= left
            assert head.bound is not None
            if goes_first and pool.jobs[head.bound].model is None:
                continue
            more = pool.bytes_for(head, head.bound) - ledger.accounts[head.id].committed
            alone = pool.is_alone(head.bound)
            if more <= left and not alone:
                # It starts as soon as this worker's test is over.
                left -= more
                over = pool.at + (pool.expected(head.bound) or 0.0)
                running.append((over, more, pool.average is not None))
            elif ledger.fits_alone(pool.bytes_for(head, head.bound)):
                break
        else:
            return need <= left
        # This one has a reservation: for the time when enough of what runs now is over.
        if need > left:
            return False
        left -= more
        start = pool.at
        for over, freed, is_known in sorted(running):
            if left >= 0 and not alone:
                break
            left += freed
            if is_known:
                start = max(start, over)
        if not alone and not pool.is_alone(test) and need <= left:
            return True
        seconds = pool.expected(test)
        return seconds is not None and pool.at + seconds <= start

    def admitted(self, worker: GpuWorker, tests: Sequence[int]) -> None:
        """Tests were admitted: note when they should be over."""
        pool = self._pool
        is_known = all(pool.jobs[test].duration is not None for test in tests)
        seconds = sum(pool.expected(test) or 0.0 for test in tests)
        self._ends[worker.id] = pool.at + seconds, is_known

    def overtaken_by(self, unit: Unit) -> None:
        """A test of this unit comes next: if another was first, that is nearer to being bound."""
        front = self._pool.pending.front()
        if front is not None and (unit.rank < 0 or front.rank < unit.rank):
            front.overtaken += 1

    def room_to_come(self, worker: GpuWorker) -> Iterator[int]:
        """The largest need that may start in this worker, as one test after the other ends.

        Those that wait already are served first. Where durations are unknown, tests count as
        ending in the order in which they began.
        """
        pool, ledger = self._pool, self._pool.ledgers[worker.device]
        own = ledger.floor(worker.id)
        left = ledger.capacity.budget - own
        ends: list[tuple[float, int]] = []
        for name, account in ledger.accounts.items():
            if name == worker.id:
                continue
            left -= account.committed
            if name in ledger.running and name in self._ends:
                ends.append((self._ends[name][0], account.committed - ledger.floor(name)))
        heapify(ends)
        waiting = [other for other in self.waiting(worker.device) if other is not worker]
        time, freed = pool.at, 0
        while True:
            left += freed
            short = 0
            for other in list(waiting):
                assert other.bound is not None
                more = pool.bytes_for(other, other.bound) - ledger.accounts[other.id].committed
                if more <= left - short:
                    left -= more
                    waiting.remove(other)
                    heappush(ends, (time + (pool.expected(other.bound) or 0.0), more))
                else:
                    short += more
            yield left - short + own
            if not ends:
                return
            time, freed = heappop(ends)

    def overdue(self) -> Unit | None:
        """The pending unit that is first in the order and was overtaken often enough."""
        front, patience = self._pool.pending.front(), OVERTAKEN * max(1, len(self._pool.workers))
        return front if front is not None and front.overtaken >= patience else None
