"""Tests that run and want more VRAM than the need with which they were admitted."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.pressure import Reclaiming, Waiter, held_by
from pytest_gpushare.scheduler.types import Action, Raised
from pytest_gpushare.units import format_gb


def raise_needs(pool: GpuPool, reclaiming: Reclaiming) -> Iterator[Action]:
    """Give those that want more what is there, and see to the rest."""
    for worker in list(pool.raising.values()):
        more, ledger = worker.more, pool.ledgers[worker.device]
        assert more is not None
        size = more.size
        if more.takes_less:
            there = max(ledger.limit(worker.id), ledger.accounts[worker.id].committed)
            size = min(size, there)
        if _raise(pool, worker, size):
            del pool.raising[worker.id]
            pool.note_change(worker.device)
            yield Raised(worker.id, more.number, True, size)
        elif more.size > ledger.budget:
            del pool.raising[worker.id]
            text = f"the largest budget is {format_gb(ledger.budget)} ({ledger.capacity.label})"
            yield Raised(worker.id, more.number, False, text=text)
        else:
            if not more.is_noted:
                worker.more = more._replace(is_noted=True)
                left = format_gb(max(0, ledger.limit(worker.id)))
                text = f"{left} is left for it on {ledger.capacity.label}{held_by(ledger)}"
                yield Raised(worker.id, more.number, False, is_final=False, text=text)
            yield from reclaiming.reclaim(ledger, Waiter(worker, worker.sent[0], None), more.size)


def _raise(pool: GpuPool, worker: GpuWorker, size: int) -> bool:
    """Let the running test of a worker use so much of its device. Returns whether it may.

    What was sent after it, or is to take its place, keeps its need.
    """
    ledger, tests = pool.ledgers[worker.device], list(worker.sent)
    if worker.reserved and worker.bound is not None:
        tests.append(worker.bound)
    needs = [pool.live_need(worker, t, worker.device) for t in tests if t not in pool.helped]
    need = max([size, *needs])
    if need > max(ledger.limit(worker.id), ledger.accounts[worker.id].committed):
        return False
    ledger.start(worker.id, need)
    return True
