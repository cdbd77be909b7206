"""What this session has of each device and wants there, and what the others leave to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pytest_gpushare.leases.claims import DeviceClaims, Share
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, Seniority
from pytest_gpushare.scheduler.accounts import Account, DeviceLedger
from pytest_gpushare.scheduler.gpu_pool import GpuPool
from pytest_gpushare.scheduler.pressure import Pressure
from pytest_gpushare.scheduler.types import DeviceCapacity, DeviceReading, Others

_SOONEST, _TESTS_A_SECOND = 0.1, 20_000
"""The largest pending need is looked for so often: in seconds, and by how many tests there are."""

_FEW = 100
"""So many tests are looked through after each one that starts."""


A_MODEL = -1
"""What waits is no test, but a model that tests use."""


class OwnShare(NamedTuple):
    """One device, in bytes."""

    committed: int
    """Set aside for the workers, and for tests that they were sent ahead."""
    outstanding: int
    """What of it running tests may still take."""
    present: int
    """What the workers hold."""
    kept: int
    """What they keep between tests: contexts, and what fixtures hold."""
    idle: int
    """What of that can be given up for an older session: all but the context of one worker."""
    most: int
    """What must be committed for the largest test that has not begun; 0 where none is left."""
    want: int
    """What the first test that waits lacks, where it is others that have it."""
    waits_for: int | None
    """That test, or `A_MODEL`."""
    reserved: int
    """What must stay free for neighbours and as safety buffer, whatever other sessions do."""
    reservation: int = 0
    """What of the device is kept for servers."""
    published: int = 0
    """The same without a model that waits for VRAM: what other sessions are to keep, too."""


class Sharing:
    """Computes these figures from the accounts."""

    def __init__(self, pool: GpuPool, pressure: Pressure) -> None:
        self._pool, self._pressure = pool, pressure
        self._largest: dict[str, int] = {}
        self._looked_at, self._serial = float("-inf"), -1

    def of(self, device: str) -> OwnShare:
        """The figures of one device now."""
        ledger = self._pool.ledgers[device]
        context = ledger.capacity.context
        kept = {worker: _kept(account, context) for worker, account in ledger.accounts.items()}
        total = sum(kept.values())
        largest = self._largest_pending(device)
        # It runs in the worker that keeps most already.
        most = largest + max(0, total - max([*kept.values(), 0])) if largest else 0
        committed = _committed(ledger)
        test, want = self._wanted(device, ledger)
        return OwnShare(
            committed=committed,
            outstanding=committed - ledger.present,
            present=ledger.present,
            kept=total,
            idle=total - min((min(size, context) for size in kept.values()), default=0),
            most=min(most, ledger.capacity.budget),
            want=want,
            waits_for=test,
            reserved=ledger.kept - ledger.reading.others.claimed,
            reservation=ledger.capacity.reservation + ledger.capacity.beside,
            published=(ledger.full if ledger.awaited_by_model else ledger.capacity).reservation
            + ledger.capacity.beside,
        )

    def _wanted(self, device: str, ledger: DeviceLedger) -> tuple[int | None, int]:
        if ledger.awaited_by_model:
            return A_MODEL, ledger.awaited_by_model
        pool = self._pool
        raising = [name for name in pool.raising if pool.workers[name].device == device]
        if raising:
            worker, need = pool.workers[raising[0]], pool.raising[raising[0]].size
            test = worker.sent[0]
        elif waiter := self._pressure.first_waiter(device):
            worker, test = waiter.worker, waiter.test
            need = pool.bytes_for(worker, test)
        else:
            return None, 0
        live = ledger.limit_by_free_vram(worker.id)
        if need > ledger.limit_by_budget(worker.id) or live is None or need <= live:
            # Tests of this session are in its way, or nothing is.
            return None, 0
        if ledger.bars(ledger.accounts[worker.id]):
            return None, 0
        return test, need - ledger.accounts[worker.id].committed

    def _largest_pending(self, device: str) -> int:
        pool = self._pool
        pause = _SOONEST + pool.pending.count / _TESTS_A_SECOND
        is_cheap = pool.pending.count <= _FEW and self._serial != pool.serial
        if is_cheap or pool.at - self._looked_at >= pause:
            self._looked_at, self._serial = pool.at, pool.serial
            self._largest = self._largest_by_device()
        return self._largest.get(device, 0)

    def _largest_by_device(self) -> dict[str, int]:
        pool, by_count = self._pool, dict[int, int]()
        for test in self._not_begun():
            need = pool.need(test)
            size = need.vram
            if size is None:
                size = max((pool.bytes_for(w, test) for w in pool.workers.values()), default=0)
            if size > by_count.get(need.devices, 0):
                by_count[need.devices] = size
        found: dict[str, int] = {}
        for count, size in by_count.items():
            for worker in pool.workers.values():
                for device in worker.devices[:count]:
                    found[device] = max(size, found.get(device, 0))
        return found

    def _not_begun(self) -> Iterator[int]:
        pool = self._pool
        for unit in pool.pending.all():
            yield from unit.tests
        for worker in pool.workers.values():
            yield from worker.unit.tests
            if worker.bound is not None:
                yield worker.bound


def _committed(ledger: DeviceLedger) -> int:
    if not ledger.beyond:
        return ledger.committed
    # The first test that was sent ahead takes no more than is free, those behind it may want more.
    free = ledger.reading.free
    accounts = ledger.accounts.values()
    left = max(one.ahead for one in accounts) if free is None else max(0, free - ledger.kept)
    return sum(max(one.committed, one.present + min(one.ahead, left)) for one in accounts)


def _kept(account: Account, context: int) -> int:
    if not account.has_context:
        return 0
    if not account.running:
        return account.committed
    return min(account.committed, max(account.held, context))


def others_on(
    device: DeviceCapacity,
    reading: DeviceReading,
    claims: DeviceClaims,
    own: OwnShare,
    seniority: Seniority,
    ticket: int,
) -> Others:
    """What the other sessions make of a device, from their records and a reading of it.

    `ticket` is this session's place in the queue, 0 for none.
    """
    share = Share(seniority, own.kept, own.committed - own.kept, own.idle, own.most)
    resident = device.resident if reading.resident is None else reading.resident
    # Sessions may keep different amounts for Ollama: the largest counts, once.
    kept = own.reservation - device.beside
    more = max(0, max(kept, claims.reserved - device.beside) - resident)
    more -= max(0, kept - resident)
    taken = claims.leased
    if reading.free is None:
        # The budget is what there is without other sessions: what they hold is missing there, too.
        taken += claims.held
        left = device.budget - own.committed - taken - more
        capacity = device.budget
        claims = claims._replace(counts_twice=False)
    else:
        left = reading.free - own.reserved - own.outstanding - claims.leased - more
        capacity = reading.free - own.reserved - more + own.present + claims.held
        if claims.counts_twice:
            # What the others hold of it is not known.
            capacity = max(capacity, device.budget - more)
    left = max(0, left)
    ahead = claims.ahead(left, ticket, share, capacity, own.reservation)
    return Others(
        claimed=taken + more + ahead,
        held_by_others=claims.leased + claims.held + ahead + max(0, more),
        keepable=claims.keepable(capacity, share),
        owed=claims.owed(left, share, own.want),
        lacks=claims.lacks(left, share, own.want),
        are_waiting=bool(claims.waiting),
    )


def lease_on(device: DeviceCapacity, own: OwnShare, *, is_shared: bool) -> DeviceLease:
    """What this session publishes for a device: all that it may use while it is alone there."""
    lease = own.committed if is_shared else max(own.committed, device.budget)
    return DeviceLease(
        max(0, lease),
        want=max(0, own.want) if is_shared else 0,
        reserved=own.published,
        spare=max(0, lease - own.kept),
        idle=max(0, own.idle),
        most=max(0, own.most),
    )


def are_shared(claims: Mapping[str, DeviceClaims], own: Mapping[str, DeviceCapacity]) -> bool:
    """Whether others claim VRAM of these devices: for tests, or for a model loaded for tests."""
    return any(
        claim.shares or claim.reserved > own[uuid].reservation + own[uuid].beside
        for uuid, claim in claims.items()
        if uuid in own
    )


def is_asked(claims: Mapping[str, DeviceClaims], record: LeaseRecord) -> bool:
    """Whether one waits where this session's workers hold what it can do without: what they hold
    is all that a session leases beside others."""
    return any(claim.waiting and record.lease(uuid).idle for uuid, claim in claims.items())
