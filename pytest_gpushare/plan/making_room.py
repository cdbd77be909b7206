"""Room is made for a test that waits: idle neighbours give back what they hold."""

from __future__ import annotations

from pytest_gpushare.plan.accounts import Ledger
from pytest_gpushare.plan.gpu_side import GpuSide
from pytest_gpushare.plan.gpu_worker import GpuWorker
from pytest_gpushare.plan.units import Unit
from pytest_gpushare.plan.work import Action, EmptyCaches, Shutdown, Tell
from pytest_gpushare.units import MB, format_gb

WORTH_EMPTYING = 64 * MB
"""Bytes below which emptying caches is not worth the time."""


class MakingRoom:
    """Takes from idle workers what they hold, the gentlest way first."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side

    def is_under_way(self, ledger: Ledger) -> bool:
        """Whether a worker gives something back at this moment."""
        workers = self._side.workers
        for name in ledger.accounts:
            it = workers.get(name)
            if it is not None and (it.emptying is not None or it.ending):
                return True
        return False

    def make(self, ledger: Ledger, it: GpuWorker, unit: Unit, need: int) -> list[Action]:
        """Have neighbours empty their caches, give up fixtures or end, as far as it helps."""
        if self.is_under_way(ledger):
            return []
        busy = ledger.runs_beside(it.id)
        short = need - ledger.left(it.id)
        asked = self.empty(ledger, it, short, busy)
        if asked:
            return asked
        in_the_way = need - ledger.most(it.id)
        if busy and in_the_way <= 0:
            return []
        if not busy:
            asked = self._ask(ledger, it, short, busy=False, fixtures=True)
            if asked:
                return asked
        return self._end(ledger, it, unit, in_the_way if busy else short)

    def empty(self, ledger: Ledger, it: GpuWorker, short: int, busy: bool) -> list[Action]:
        """Have idle neighbours give back what they retain, where that helps."""
        if self._side.policy.empty_caches == "never":
            return []
        return self._ask(ledger, it, short, busy=busy, fixtures=False)

    def _ask(
        self, ledger: Ledger, it: GpuWorker, short: int, *, busy: bool, fixtures: bool
    ) -> list[Action]:
        side = self._side
        found = [
            (size, other)
            for size, name in ledger.retained(WORTH_EMPTYING)
            if (other := side.workers.get(name)) is not None
            and other is not it
            and other.is_free
            and other.emptied <= fixtures
        ]
        if not found or (busy and sum(size for size, _ in found) < short):
            return []
        asked: list[Action] = []
        for size, other in sorted(found, key=lambda pair: -pair[0]):
            if short <= 0:
                break
            short -= size
            other.emptying, other.emptied = side.at, 1 + fixtures
            side.refresh(other)
            asked.append(EmptyCaches(other.id, fixtures))
        return asked

    def _end(self, ledger: Ledger, it: GpuWorker, unit: Unit, short: int) -> list[Action]:
        side = self._side
        idle = [
            (ledger.accounts[name].committed, other)
            for name in ledger.accounts
            if (other := side.workers.get(name)) is not None and other is not it and other.is_free
        ]
        actions: list[Action] = []
        for size, other in sorted(idle, key=lambda pair: -pair[0]):
            if short <= 0 or size <= 0:
                break
            short -= size
            other.ending = True
            side.refresh(other)
            name = side.jobs[unit.tests[0]].nodeid
            text = f"{other.id} ended: its {format_gb(size)} were in the way of {name}"
            actions.append(Shutdown(other.id))
            actions.append(Tell("worker-ended", text, {"worker": other.id, "bytes": size}))
        return actions
