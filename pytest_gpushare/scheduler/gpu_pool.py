"""The GPU workers, their devices and their tests: what is known, and what may start now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pytest_gpushare.scheduler.accounts import Ledger
from pytest_gpushare.scheduler.fairness import Claims
from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.queue import IN_ORDER, Kind, Pending, Unit, kind_of
from pytest_gpushare.scheduler.types import Job, Policy, Room, Worker


class GpuWorker:
    """What a GPU worker is doing."""

    __slots__ = (
        "busy", "collected", "device", "devices", "emptied", "emptying", "ending", "helps_in", "id",
        "last_group", "latest", "left_groups", "most", "own", "serial", "slot", "test", "unit",
    )  # fmt: skip

    def __init__(
        self, worker: Worker, collected: Collection[int] | None, rooms: Mapping[str, Room]
    ) -> None:
        self.id = worker.id
        self.slot = worker.slot
        self.devices = worker.devices
        self.device = worker.devices[0]
        """Its own."""
        self.own = worker.devices[:1]
        self.collected = collected
        budgets = [rooms[device].budget for device in worker.devices]
        self.most = {count: min(budgets[:count]) for count in range(1, len(budgets) + 1)}
        """Number of devices -> the largest need on each that it can ever meet."""
        self.test: int | None = None
        """The GPU test that it runs, or the last of the tests that it helps out with."""
        self.latest = -1
        """The GPU test that it began last."""
        self.unit: Unit | None = None
        """What it has begun."""
        self.serial = 0
        """The number of the admission of its test."""
        self.busy = False
        self.ending = False
        self.emptying: float | None = None
        """Since when it has been emptying its caches."""
        self.emptied = 0
        """How much it did of that since its last test: 1 caches, 2 fixtures too."""
        self.left_groups: set[str] = set()
        self.last_group = ""
        self.helps_in = ""
        """The group of the last test that it helped out with, where nothing came since."""

    @property
    def is_free(self) -> bool:
        """Whether it can be given something to do."""
        return not (self.busy or self.ending or self.emptying is not None)

    @property
    def is_bound(self) -> bool:
        """Whether it has begun a group that it has to go on with."""
        return self.unit is not None and bool(self.unit.tests)

    def begin(self, unit: Unit) -> None:
        """It begins a unit; to the groups that it had before it does not come back."""
        if self.last_group and self.last_group != unit.key:
            self.left_groups.add(self.last_group)
        self.unit, self.last_group, self.helps_in = unit, unit.key, ""

    def not_begun(self, helps: bool) -> None:
        """It never began the test that it was given: that is the first of its unit again."""
        if self.test is not None and not helps:
            self.unit = self.unit or Unit([])
            self.unit.tests.insert(0, self.test)
            self.unit.kind = None
        self.test = None

    def help_out(self, groups: Sequence[str]) -> None:
        """It helps out with tests of these groups."""
        self.left_groups.update(filter(None, [self.last_group, *groups]))
        self.last_group, self.helps_in = "", groups[-1]

    def helps_with(self, group: str) -> bool:
        """Whether it can help out with tests of this group: it sets no fixtures up again."""
        known = group in self.left_groups or group == self.last_group
        return not group or not known or group == self.helps_in

    def goes_back(self, unit: Unit, test: int) -> bool:
        """Whether it would run this test of a group after a later one, and must not."""
        is_in_order = unit.key.startswith(IN_ORDER)
        return is_in_order and unit.key == self.last_group and test < self.latest

    def knows(self, test: int) -> bool:
        """Whether it has collected the test."""
        return self.collected is None or test in self.collected


UNKNOWN = Need()


class GpuSide:
    """What the parts of the dispatcher share that deal with GPU tests."""

    def __init__(self, jobs: Sequence[Job], ledgers: dict[str, Ledger], policy: Policy) -> None:
        self.jobs = jobs
        self.ledgers = ledgers
        self.policy = policy
        self.workers: dict[str, GpuWorker] = {}
        self.pending = Pending()
        self.claims = Claims(self)
        self.has_several = policy.visible_devices == "all" and any(
            job.need is not None and job.need.devices > 1 for job in jobs
        )
        """Whether a test wants several devices: what changes on one matters on others."""
        self.serial = 0
        self.largest: Mapping[int, int] = {}
        """Number of devices -> the largest budget that a test on so many can get."""
        self._needs: list[Need] = []
        self.cold = False
        """Whether durations are unknown, so that the largest modest need comes next."""
        self.is_exact = False
        """Whether each worker admits a test with the need by which it is pending."""
        self.prefix = 0
        """How many ranks come before all others, as they need their device alone."""
        self.at = 0.0
        """The time of this step."""
        self.lonely: set[str] = set()
        """The workers that run a test beside which no other may run on its devices."""
        self.free: dict[str, dict[str, GpuWorker]] = {device: {} for device in ledgers}
        """Device -> the workers of that device that can be given something to do."""
        self.stirred: set[str] = set()
        """The devices on which something changed, so that what did not fit may fit now."""
        self.filled: dict[str, float] = dict.fromkeys(ledgers, float("-inf"))
        """Device -> when its free workers were last offered what is pending."""

    def up(self, worker: Worker, collected: Collection[int] | None) -> None:
        """A worker is ready."""
        rooms = {device: self.ledgers[device].room for device in worker.devices}
        self.workers[worker.id] = it = GpuWorker(worker, collected, rooms)
        for device in worker.devices:
            self.ledgers[device].open(worker.id)
        # Its slot may differ from those by which the order was found.
        self.is_exact = False
        self.refresh(it)

    def down(self, it: GpuWorker) -> list[int]:
        """A worker is gone; returns what it had begun and not run, which is pending again."""
        del self.workers[it.id]
        self.free[it.device].pop(it.id, None)
        self.lonely.discard(it.id)
        self.stir()
        self.claims.drop_worker(it)
        if it.unit is None or not it.unit.tests:
            return []
        queued = list(it.unit.tests)
        self.claims.drop(it.unit)
        self.pending.back(it.unit)
        return queued

    def rest(self, it: GpuWorker) -> None:
        """The worker has nothing to do any more, and what it began may be over."""
        self.lonely.discard(it.id)
        it.busy, it.test = False, None
        if it.unit is not None and not it.unit.tests:
            it.unit = None
        self.refresh(it)
        self.stir(it.device)

    @property
    def is_waited_for(self) -> bool:
        """Whether a worker is free, or will be without any test's end."""
        return any(self.free.values()) or any(
            it.emptying is not None for it in self.workers.values()
        )

    def refresh(self, it: GpuWorker) -> None:
        """The worker has become free, or is not any more."""
        if it.is_free:
            self.free[it.device][it.id] = it
            self.stirred.add(it.device)
        else:
            self.free[it.device].pop(it.id, None)

    def stir(self, device: str = "") -> None:
        """Something changed on a device, or everywhere."""
        if device and not self.has_several:
            self.stirred.add(device)
        else:
            self.stirred.update(self.ledgers)

    def take_stirred(self) -> list[str]:
        """The devices on which something changed since this was asked last."""
        stirred = list(self.stirred)
        if len(stirred) > 1:
            stirred.sort()
        self.stirred.clear()
        return stirred

    # --- what is known of a test ---

    def settle(self, largest: Mapping[int, int]) -> None:
        """From now on it is known what each test needs: the largest budgets are.

        What was learned is a peak with a margin: where the margin is all that does not fit,
        the test gets the whole budget of the largest device.
        """
        self.largest = largest
        self._needs = needs = [job.need or UNKNOWN for job in self.jobs]
        for test, need in enumerate(needs):
            if need.source == "learned" and need.vram is not None:
                most = largest.get(need.devices, 0)
                if need.vram > most:
                    needs[test] = need._replace(vram=most)

    def need(self, test: int) -> Need:
        """What is known of its need."""
        return self._needs[test]

    def kind(self, unit: Unit) -> Kind:
        """How many devices its next test wants, and whether alone."""
        if unit.kind is None:
            unit.kind = kind_of(self.need(unit.tests[0]))
        return unit.kind

    def devices(self, it: GpuWorker, count: int) -> tuple[str, ...]:
        """The devices that a test uses in this worker."""
        return it.own if count == 1 else it.devices[:count]

    def bytes_for(self, it: GpuWorker, test: int) -> int:
        """Bytes on each device with which the test is admitted in this worker."""
        need = self.need(test)
        if need.vram is not None:
            return need.vram
        return min(it.slot, it.most.get(need.devices, it.slot))

    def could(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether this worker can ever run all tests of the unit."""
        if it.ending:
            return False
        if it.collected is not None and not all(it.knows(test) for test in unit.tests):
            return False
        if unit.wants is None and len(unit.tests) == 1:
            need = self.need(unit.tests[0])
            return it.most.get(need.devices, -1) >= (need.vram or 0)
        if unit.wants is None:
            wants: dict[int, int] = {}
            for test in unit.tests:
                need = self.need(test)
                wants[need.devices] = max(wants.get(need.devices, 0), need.vram or 0)
            unit.wants = wants
        return all(it.most.get(count, -1) >= vram for count, vram in unit.wants.items())

    def anybody_could(self, unit: Unit) -> bool:
        """Whether any worker can ever run all tests of the unit."""
        return any(self.could(it, unit) for it in self.workers.values())

    def enters(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether the worker may begin it: it never comes back to a group that it has left."""
        if unit.key and unit.key in it.left_groups and unit.key != it.last_group:
            # Unless nobody else can: a test must not be lost for a fixture's sake.
            for other in self.workers.values():
                fresh = unit.key not in other.left_groups or other.last_group == unit.key
                if other is not it and fresh and self.could(other, unit):
                    return False
        return self.could(it, unit)

    # --- admission ---

    def limit(self, it: GpuWorker, kind: Kind) -> int:
        """The largest need of this kind that may start in this worker now; -1: none."""
        count, exclusive = kind
        if count == 1 and not exclusive and not self.lonely:
            return self.ledgers[it.device].limit(it.id)
        devices = self.devices(it, count)
        if len(devices) < count:
            return -1
        most = 1 << 61
        for device in devices:
            ledger = self.ledgers[device]
            if exclusive and ledger.runs_beside(it.id):
                return -1
            if self.lonely and not self.lonely.isdisjoint(ledger.running.keys() - {it.id}):
                return -1
            limit = ledger.limit(it.id)
            if limit < most:
                most = limit
        return most

    def fits(self, it: GpuWorker, unit: Unit) -> bool:
        """Whether the unit's next test may start in this worker now."""
        kind = self.kind(unit)
        return self.fits_in(it, unit, kind, self.limit(it, kind))

    def fits_in(self, it: GpuWorker, unit: Unit, kind: Kind, limit: int) -> bool:
        """The same where the limit for tests of its kind is known."""
        need = self.bytes_for(it, unit.tests[0])
        if need > limit:
            return False
        if not self.claims.exist:
            return True
        allow = self.claims.allow
        return all(allow(it, unit, need, kind, device) for device in self.devices(it, kind[0]))
