"""Whose turn it is on a device: the test for which something is done, and by which worker."""

from __future__ import annotations

from pytest_gpushare.plan.gpu_side import GpuSide
from pytest_gpushare.plan.gpu_worker import GpuWorker
from pytest_gpushare.plan.units import Unit


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
