"""The GPU workers: which test each of them gets at the moment when it is free."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pytest_gpushare.plan.accounts import Ledger
from pytest_gpushare.plan.claims import Claims
from pytest_gpushare.plan.gpu_worker import GpuWorker
from pytest_gpushare.plan.needs import Need
from pytest_gpushare.plan.units import GROUPED, Kind, Pending, Unit
from pytest_gpushare.plan.work import Job, Policy, Run

UNKNOWN = Need()
TRIES = 64
"""Units that are looked at for one worker: those that it has not collected cost a try each."""


class GpuSide:
    """Order and admission of GPU tests."""

    def __init__(self, jobs: Sequence[Job], ledgers: dict[str, Ledger], policy: Policy) -> None:
        self.jobs = jobs
        self.ledgers = ledgers
        self.policy = policy
        self.workers: dict[str, GpuWorker] = {}
        self.pending = Pending()
        self.claims = Claims(self)
        self.serial = 0
        self.largest: dict[int, int] = {}
        """Number of devices -> the largest budget that a test on so many can get."""
        self.cold = False
        """Whether durations are unknown, so that the largest modest need comes next."""
        self.prefix = 0
        """How many ranks come before all others, as they need their device alone."""
        self.at = 0.0
        """The time of this step."""
        self.lonely: set[str] = set()
        """The workers that run a test beside which no other may run on its devices."""
        self.has_groups = any(job.group for job in jobs)
        self.free: dict[str, dict[str, GpuWorker]] = {device: {} for device in ledgers}
        """Device -> the workers of that device that can be given something to do."""
        self.stirred: set[str] = set()
        """The devices on which something changed, so that what did not fit may fit now."""

    def refresh(self, it: GpuWorker) -> None:
        """The worker has become free, or is not any more."""
        free = self.free[it.worker.devices[0]]
        if it.is_free:
            free[it.worker.id] = it
            self.stirred.add(it.worker.devices[0])
        else:
            free.pop(it.worker.id, None)

    def stir(self, device: str = "") -> None:
        """Something changed on a device, or everywhere."""
        several = any(count > 1 for count, _ in self.pending.trees)
        self.stirred.update(self.ledgers if several or not device else (device,))

    # --- what is known of a test ---

    def need(self, test: int) -> Need:
        """What is known of its need.

        What was learned is a peak with a margin: where the margin is all that does not fit,
        the test gets the whole budget of the largest device.
        """
        need = self.jobs[test].need or UNKNOWN
        if need.source == "learned" and need.vram is not None:
            most = self.largest.get(need.devices, 0)
            if need.vram > most:
                return need._replace(vram=most)
        return need

    def kind(self, unit: Unit) -> Kind:
        """How many devices its next test wants, and whether alone."""
        need = self.need(unit.tests[0])
        return need.devices, need.exclusive or unit.alone

    def devices(self, it: GpuWorker, count: int) -> tuple[str, ...]:
        """The devices that a test uses in this worker."""
        return it.worker.devices[:count]

    def bytes_for(self, it: GpuWorker, test: int) -> int:
        """Bytes on each device with which the test is admitted in this worker."""
        need = self.need(test)
        if need.vram is not None:
            return need.vram
        budgets = [self.ledgers[d].room.budget for d in self.devices(it, need.devices)]
        return min(it.worker.slot, *budgets)

    # --- a worker is free ---

    def fill(self, stirred: Collection[str]) -> Iterator[Run]:
        """Something to do for each free worker of these devices, where anything fits."""
        free = [it for device in stirred for it in self.free[device].values()]
        if len(free) > 1:
            # Who has begun something goes first, then who has a context: a new one costs VRAM.
            free.sort(key=lambda it: (it.unit is None, -self._held(it)))
        failed: dict[str, int] = {}
        for it in free:
            device = it.worker.devices[0]
            if it.unit is None and device in failed and failed[device] >= self._held(it):
                # A worker that holds no less than this one has found nothing there.
                continue
            run = self._pick(it)
            if run is not None:
                failed.pop(device, None)
                yield run
            elif it.unit is None and it.collected is None and not it.left_groups:
                failed[device] = self._held(it)

    def _held(self, it: GpuWorker) -> int:
        device = it.worker.devices[0]
        return self.ledgers[device].accounts[it.worker.id].committed

    def _pick(self, it: GpuWorker) -> Run | None:
        if it.unit is not None:
            return self._begin(it, it.unit) if self.fits(it, it.unit) else None
        unit = self._claimed(it) or self._first(it) or self._share(it)
        return self._begin(it, unit) if unit else None

    def _claimed(self, it: GpuWorker) -> Unit | None:
        """What claims the worker's device, where the worker can serve it now."""
        claim = self.claims.head(it.worker.devices[0])
        if claim is None or claim.worker not in (None, it):
            return None
        unit = claim.unit
        return unit if it.knows(unit.tests[0]) and self.fits(it, unit) else None

    def _first(self, it: GpuWorker) -> Unit | None:
        """The first unit in the order that fits, and that does not stand in a claim's way."""
        for unit in self.pending.again:
            if self._enters(it, unit) and self.fits(it, unit):
                return unit
        best = -1
        for kind, tree in self.pending.trees.items():
            limit = self.limit(it, kind)
            rank = tree.first(limit)
            if self.cold and rank >= self.prefix:
                modest = tree.first(limit - self._spare(it, tree.smallest))
                rank = rank if modest < 0 else modest
            for _ in range(TRIES):
                if rank < 0 or (0 <= best < rank):
                    break
                unit = self.pending.units[rank]
                if self._enters(it, unit) and self._fits_in(it, unit, kind, limit):
                    best = rank
                    break
                rank = tree.first(limit, rank + 1)
        if best >= 0:
            return self.pending.units[best]
        for unit in self.pending.last:
            if self._enters(it, unit) and self.fits(it, unit):
                return unit
        return None

    def _spare(self, it: GpuWorker, smallest: int) -> int:
        """Without known durations: room for the smallest pending tests on the free workers."""
        device = it.worker.devices[0]
        others = len(self.free[device]) - 1
        return others * min(smallest, self.ledgers[device].room.budget)

    def _share(self, it: GpuWorker) -> Unit | None:
        """The second half of what another worker has begun, where groups may be split."""
        if self.policy.dist in GROUPED or not self.has_groups:
            return None
        begun = [
            other.unit
            for other in self.workers.values()
            if other is not it
            and other.unit is not None
            and len(other.unit.tests) > 1
            and self._enters(it, other.unit)
        ]
        whole = max(begun, key=lambda unit: len(unit.tests), default=None)
        if whole is None:
            return None
        half = len(whole.tests) // 2
        tests = list(whole.tests)
        part = Unit(type(whole.tests)(tests[-half:]), whole.key)
        if not it.knows(part.tests[0]) or not self.fits(it, part):
            return None
        for _ in range(half):
            whole.tests.pop()
        self.pending.back(part)
        return part

    def _enters(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether the worker may begin it: it never comes back to a group that it has left."""
        if unit.key and unit.key in it.left_groups and unit.key != it.last_group:
            # Unless nobody else can: a test must not be lost for a fixture's sake.
            for other in self.workers.values():
                fresh = unit.key not in other.left_groups or other.last_group == unit.key
                if other is not it and fresh and self.could(other, unit):
                    return False
        return self.could(it, unit)

    def could(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether this worker can ever run all tests of the unit."""
        if it.ending:
            return False
        if it.collected is not None and not all(it.knows(test) for test in unit.tests):
            return False
        if unit.wants is None:
            wants: dict[int, int] = {}
            for test in unit.tests:
                need = self.need(test)
                wants[need.devices] = max(wants.get(need.devices, 0), need.vram or 0)
            unit.wants = wants
        return all(
            len(seen := self.devices(it, count)) == count
            and all(vram <= self.ledgers[device].room.budget for device in seen)
            for count, vram in unit.wants.items()
        )

    def anybody_could(self, unit: Unit) -> bool:
        """Whether any worker can ever run all tests of the unit."""
        return any(self.could(it, unit) for it in self.workers.values())

    # --- admission ---

    def limit(self, it: GpuWorker, kind: Kind) -> int:
        """The largest need of this kind that may start in this worker now; -1: none."""
        count, exclusive = kind
        devices = self.devices(it, count)
        if len(devices) < count:
            return -1
        most = 1 << 61
        for device in devices:
            ledger = self.ledgers[device]
            if exclusive or self.lonely:
                running = [name for name in ledger.running if name != it.worker.id]
                if running and (exclusive or not self.lonely.isdisjoint(running)):
                    return -1
            most = min(most, ledger.limit(it.worker.id))
        return most

    def fits(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether the unit's next test may start in this worker now."""
        kind = self.kind(unit)
        return self._fits_in(it, unit, kind, self.limit(it, kind))

    def _fits_in(self, it: GpuWorker, unit: Unit, kind: Kind, limit: int) -> bool:
        need = self.bytes_for(it, unit.tests[0])
        return need <= limit and all(
            self.claims.allow(it, unit, need, kind, device) for device in self.devices(it, kind[0])
        )

    def _begin(self, it: GpuWorker, unit: Unit) -> Run:
        kind = self.kind(unit)
        if it.unit is not unit:
            self.pending.take(unit, kind)
            if it.last_group and it.last_group != unit.key:
                it.left_groups.add(it.last_group)
            it.unit, it.last_group = unit, unit.key
        test = unit.tests.popleft()
        need = self.bytes_for(it, test)
        self.serial += 1
        it.test, it.busy, it.serial, it.emptied = test, True, self.serial, 0
        devices = self.devices(it, kind[0])
        for device in devices if need or kind[1] else ():
            self.ledgers[device].start(it.worker.id, need)
        waited = 0.0 if unit.since is None else self.at - unit.since
        if kind[1]:
            self.lonely.add(it.worker.id)
        self.refresh(it)
        self.claims.admitted(it, unit, devices)
        if unit.tests and self.policy.dist not in GROUPED:
            # Idle workers may share it.
            self.stir()
        unit.since, unit.overtaken = None, 0
        source = self.need(test).source if need else ""
        return Run(it.worker.id, (test,), True, need, source, waited, alone=kind[1])
