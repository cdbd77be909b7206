"""Which test each GPU worker gets at the moment when it is free."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_gpushare.scheduler.gpu_pool import GpuSide, GpuWorker
from pytest_gpushare.scheduler.queue import GROUPED, Order, Unit
from pytest_gpushare.scheduler.types import Run


def next_on(device: str, side: GpuSide) -> tuple[GpuWorker, Unit] | None:
    """The free worker and what it would run next; None where nothing waits for the device."""
    free = side.free[device]
    if not free:
        return None
    claim = side.claims.head(device)
    if claim is not None and claim.worker is not None and claim.worker.id in free:
        begun = claim.worker.unit
        return claim.worker, begun if begun is not None and begun.tests else claim.unit
    bound: tuple[GpuWorker, Unit] | None = None
    unbound: list[GpuWorker] = []
    for it in free.values():
        if it.unit is None or not it.unit.tests:
            unbound.append(it)
        elif bound is None:
            bound = it, it.unit
    if len(unbound) > 1:
        accounts = side.ledgers[device].accounts
        unbound.sort(key=lambda it: -accounts[it.id].committed)
    if claim is not None and claim.worker is None:
        for it in unbound:
            if side.enters(it, claim.unit):
                return it, claim.unit
    if bound is not None:
        return bound
    for it in unbound:
        unit = first_for(it, side)
        if unit is not None:
            return it, unit
    return None


def first_for(it: GpuWorker, side: GpuSide) -> Unit | None:
    """The first pending unit that this worker may ever begin."""
    pending = side.pending
    for unit in pending.again:
        if side.enters(it, unit):
            return unit
    first: Unit | None = None
    for kind, tree in pending.trees.items():
        most = it.most.get(kind[0], -1)
        rank = tree.first(most)
        while rank >= 0 and not side.enters(it, pending.units[rank]):
            rank = tree.first(most, rank + 1)
        if rank >= 0 and (first is None or rank < first.rank):
            first = pending.units[rank]
    return first


TRIES = 64
"""Units that are looked at for one worker: those that it has not collected cost a try each."""


class Filling:
    """Gives free workers the first tests in the order that may start."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side
        self._may_split = side.policy.dist not in GROUPED
        self._may_share = self._may_split and any(job.group for job in side.jobs)

    def fill(self, devices: Iterable[str]) -> list[Run]:
        """Something to do for each free worker of these devices, where anything fits."""
        side = self._side
        free: list[GpuWorker] = []
        for device in devices:
            side.filled[device] = side.at
            free += side.free[device].values()
        if len(free) > 1:
            # Who has begun something goes first, then who has a context: a new one costs VRAM.
            free.sort(key=self._turn)
        runs: list[Run] = []
        failed: dict[str, int] = {}
        for it in free:
            if failed and it.unit is None and failed.get(it.device, -1) >= self._held(it):
                # A worker that holds no less than this one, and may do as much, found nothing.
                continue
            unit = self._pick(it)
            if unit is not None:
                failed.pop(it.device, None)
                runs.append(self._begin(it, unit))
            elif it.unit is None and self._stands_for_others(it):
                failed[it.device] = self._held(it)
        return runs

    def _stands_for_others(self, it: GpuWorker) -> bool:
        """Whether what it may not start no other idle worker of its device may."""
        side = self._side
        is_special = it.left_groups or side.has_several or side.claims.exist
        return it.collected is None and not is_special

    def _turn(self, it: GpuWorker) -> tuple[bool, int]:
        return it.unit is None, -self._held(it)

    def _held(self, it: GpuWorker) -> int:
        return self._side.ledgers[it.device].accounts[it.id].committed

    def _pick(self, it: GpuWorker) -> Unit | None:
        if it.unit is not None:
            return it.unit if self._side.fits(it, it.unit) else None
        unit = self._claimed(it) if self._side.claims.exist else None
        unit = unit or self._first(it)
        return self._share(it) if unit is None and self._may_share else unit

    def _claimed(self, it: GpuWorker) -> Unit | None:
        """What claims the worker's device, where the worker can serve it now."""
        side = self._side
        claim = side.claims.head(it.device)
        if claim is None or claim.worker not in (None, it):
            return None
        unit = claim.unit
        return unit if side.enters(it, unit) and side.fits(it, unit) else None

    def _first(self, it: GpuWorker) -> Unit | None:
        """The first unit in the order that fits, and that does not stand in a claim's way."""
        side = self._side
        pending = side.pending
        for unit in pending.again:
            if side.enters(it, unit) and side.fits(it, unit):
                return unit
        best = -1
        plain = it.collected is None
        sure = side.is_exact and not side.claims.exist
        for kind, tree in pending.trees.items():
            limit = side.limit(it, kind)
            rank = self._first_cold(it, tree, limit) if side.cold else tree.first(limit)
            for _ in range(TRIES):
                if rank < 0 or (0 <= best < rank):
                    break
                unit = pending.units[rank]
                # What fits now is a test that the worker could ever run, if it has collected it.
                enters = (plain and not unit.key) or side.enters(it, unit)
                if enters and (sure or side.fits_in(it, unit, kind, limit)):
                    best = rank
                    break
                rank = tree.first(limit, rank + 1)
        return pending.units[best] if best >= 0 else None

    def _first_cold(self, it: GpuWorker, tree: Order, limit: int) -> int:
        """Without known durations: the largest need that leaves room for others.

        That is room for the smallest pending tests on the other free workers.
        """
        side = self._side
        if tree.front < side.prefix:
            rank = tree.first(limit)
            if rank < side.prefix:
                return rank
        others = len(side.free[it.device]) - 1
        spare = others * min(tree.smallest, side.ledgers[it.device].room.budget) if others else 0
        modest = tree.first(limit - spare)
        return modest if modest >= 0 or not spare else tree.first(limit)

    def _share(self, it: GpuWorker) -> Unit | None:
        """The second half of what another worker has begun."""
        side = self._side
        begun = [
            other.unit
            for other in side.workers.values()
            if other is not it
            and other.unit is not None
            and len(other.unit.tests) > 1
            and not it.goes_back(other.unit, other.unit.tests[-(len(other.unit.tests) // 2)])
            and side.enters(it, other.unit)
        ]
        whole = max(begun, key=lambda unit: len(unit.tests), default=None)
        if whole is None:
            return None
        half = len(whole.tests) // 2
        part = Unit(whole.tests[-half:], whole.key)
        if not it.knows(part.tests[0]) or not side.fits(it, part):
            return None
        del whole.tests[-half:]
        side.pending.back(part)
        return part

    def _begin(self, it: GpuWorker, unit: Unit) -> Run:
        side = self._side
        kind = count, alone = side.kind(unit)
        if it.unit is not unit:
            side.pending.take(unit, kind)
            it.begin(unit)
        test = unit.next()
        known = side.need(test)
        need = known.vram if known.vram is not None else side.bytes_for(it, test)
        side.serial += 1
        it.test, it.busy, it.serial, it.emptied = test, True, side.serial, 0
        it.latest = test
        devices = side.devices(it, count)
        if need or alone:
            for device in devices:
                side.ledgers[device].start(it.id, need)
        waited = 0.0 if unit.since is None else side.at - unit.since
        if alone:
            side.lonely.add(it.id)
        side.free[it.device].pop(it.id, None)
        side.claims.admitted(it, unit, devices)
        if unit.tests and self._may_split:
            # Idle workers may share it.
            side.stir()
        unit.since, unit.overtaken = None, 0
        return Run(it.id, (test,), True, need, known.source if need else "", waited, "", alone)
