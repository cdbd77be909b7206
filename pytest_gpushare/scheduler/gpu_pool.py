"""The GPU workers, their devices and their tests: what is known, and what may start now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from pytest_gpushare.scheduler.accounts import DeviceLedger
from pytest_gpushare.scheduler.needs import IN_ORDER, Need
from pytest_gpushare.scheduler.queue import Kind, Pending, Unit, kind_of
from pytest_gpushare.scheduler.types import DeviceCapacity, Job, MoreWanted, Policy, Worker

UNKNOWN = Need()


class GpuWorker:
    """A GPU worker, as the dispatcher sees it."""

    __slots__ = (
        "bound", "collected", "deadline", "device", "devices", "emptied",
        "emptying", "ending", "helps_in", "id", "last_group", "latest", "leaves", "left_groups",
        "most", "question", "reserved", "sent", "slot", "unit", "waiting_since",
    )  # fmt: skip

    def __init__(
        self,
        worker: Worker,
        collected: Collection[int] | None,
        capacities: Mapping[str, DeviceCapacity],
    ) -> None:
        self.id = worker.id
        self.slot = worker.slot
        self.devices = worker.devices
        self.device = worker.devices[0]
        """Its own."""
        self.collected = collected
        budgets = [capacities[device].budget for device in worker.devices]
        self.most = {count: min(budgets[:count]) for count in range(1, len(budgets) + 1)}
        """Number of devices -> the largest need on each that it can ever meet."""
        self.sent: list[int] = []
        """Tests that were admitted and are not over, in order; it runs the first one."""
        self.bound: int | None = None
        """The test that it has next, and that waits for its admission."""
        self.reserved = False
        """Whether the bound test takes the place of the one that runs."""
        self.waiting_since: float | None = None
        """When the bound test was first found not to fit."""
        self.question = ""
        """Where in the running test the worker requested its next one: `start` or `end`."""
        self.deadline: float | None = None
        """When its short tests should long be over."""
        self.latest = -1
        """The GPU test that it was given last."""
        self.unit = Unit([])
        """The group of which it has been given a part, with the tests that follow."""
        self.ending = False
        self.leaves = False
        """Whether it is to end as soon as it is idle, for another session's sake."""
        self.emptying: float | None = None
        """Since when it has been emptying its caches."""
        self.emptied = 0
        """How much it did of that since its last test: 1 caches, 2 fixtures too."""
        self.left_groups: set[str] = set()
        self.last_group = ""
        self.helps_in = ""
        """The group of the last CPU test that it was given, where nothing came since."""

    @property
    def is_between_tests(self) -> bool:
        """Whether it runs nothing and is not busy otherwise."""
        return not (self.sent or self.ending or self.emptying is not None)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do, and no fixtures of tests that are over."""
        return self.bound is None and self.is_between_tests

    def begin(self, unit: Unit) -> None:
        """Take a unit; the worker does not come back to the groups that it had before it."""
        if self.last_group and self.last_group != unit.key:
            self.left_groups.add(self.last_group)
        self.unit, self.last_group, self.helps_in = unit, unit.key, ""

    def helps_with(self, group: str) -> bool:
        """Whether it can take CPU tests of this group and set no fixtures up again."""
        known = group in self.left_groups or group == self.last_group
        return not group or not known or group == self.helps_in

    def goes_back(self, unit: Unit, test: int) -> bool:
        """Whether it would run this test of a group after a later one, and must not."""
        is_in_order = unit.key.startswith(IN_ORDER)
        return is_in_order and unit.key == self.last_group and test < self.latest

    def knows(self, *tests: int) -> bool:
        """Whether it has collected these tests."""
        return self.collected is None or all(test in self.collected for test in tests)


class GpuPool:
    """What the parts of the dispatcher share that deal with GPU tests."""

    def __init__(
        self, jobs: Sequence[Job], ledgers: dict[str, DeviceLedger], policy: Policy
    ) -> None:
        self.jobs = jobs
        self.ledgers = ledgers
        self.policy = policy
        self.workers: dict[str, GpuWorker] = {}
        self.pending = Pending()
        self.has_several = policy.visible_devices == "all" and any(
            job.need is not None and job.need.devices > 1 for job in jobs
        )
        """Whether a test wants several devices: what changes on one matters on others."""
        self.serial = 0
        """The number of the latest admission."""
        self.largest: Mapping[int, int] = {}
        """Number of devices -> the largest budget that a test on so many can get."""
        self._needs: list[Need] = []
        self.refusals: dict[int, tuple[str, str]] = {}
        """Test -> outcome and reason, where it is reported without being run."""
        self.forced: dict[int, str] = {}
        """Test that starts though there is no room, as soon as it is alone -> why."""
        self.cold = False
        """Whether durations are unknown, so that the largest modest need comes next."""
        self.is_exact = False
        """Whether each worker admits a test with the need by which it is pending."""
        self.prefix = 0
        """How many ranks come before all others, as they need their device alone."""
        self.at = 0.0
        """The time of this step."""
        self.exclusive: set[str] = set()
        """The workers that run a test beside which no other may run on its devices."""
        self.idle: dict[str, dict[str, GpuWorker]] = {device: {} for device in ledgers}
        """Device -> the idle workers of that device."""
        self.waiting: dict[str, GpuWorker] = {}
        """The workers whose next test waits for its admission, in the order of binding."""
        self.raising: dict[str, MoreWanted] = {}
        """Worker -> what its running test wants beyond its need, and waits for."""
        self.changed: set[str] = set()
        """The devices on which something changed, so that what did not fit may fit now."""
        self.filled: dict[str, float] = dict.fromkeys(ledgers, float("-inf"))
        """Device -> when its workers were last offered what is pending."""
        self.average: float | None = None
        """Seconds that a test lasted lately."""
        self.helped: set[int] = set()
        """The CPU tests that GPU workers were sent."""
        self.bars: Callable[[GpuWorker, int], bool] = lambda _worker, _test: False
        """Whether a test waits for a model of Ollama's: to be loaded, or to give VRAM back."""

    def up(self, worker: Worker, collected: Collection[int] | None) -> None:
        """A worker is ready."""
        capacities = {device: self.ledgers[device].full for device in worker.devices}
        self.workers[worker.id] = gpu_worker = GpuWorker(worker, collected, capacities)
        for device in worker.devices:
            self.ledgers[device].open(worker.id)
        # Its slot may differ from those by which the order was found.
        self.is_exact = False
        self.refresh(gpu_worker)

    def down(self, worker: GpuWorker) -> None:
        """A worker is gone; the tests that it had and was not sent are pending again."""
        del self.workers[worker.id]
        self.idle[worker.device].pop(worker.id, None)
        self.waiting.pop(worker.id, None)
        self.raising.pop(worker.id, None)
        self.exclusive.discard(worker.id)
        self.note_change()
        self.unbind(worker)
        if worker.unit.tests:
            self.pending.back(worker.unit)

    def unbind(self, worker: GpuWorker) -> None:
        """Put the bound test back: it is the first of its group, or pending by itself."""
        test, worker.bound, worker.reserved = worker.bound, None, False
        self.waiting.pop(worker.id, None)
        if test is None:
            return
        group = self.jobs[test].group
        if worker.unit.tests and worker.unit.key == group:
            worker.unit.put_first(test)
            self.note_change()
        else:
            self.put_back(Unit([test], group))

    def put_back(self, unit: Unit, *, first: bool = False) -> None:
        """A unit is pending again."""
        self.pending.back(unit, first=first)
        self.note_change()

    def refresh(self, worker: GpuWorker) -> None:
        """The worker has become idle, or is not any more."""
        if worker.is_idle:
            self.idle[worker.device][worker.id] = worker
            self.changed.add(worker.device)
        else:
            self.idle[worker.device].pop(worker.id, None)

    def workers_on(self, ledger: DeviceLedger) -> Iterator[GpuWorker]:
        """The workers that see a device."""
        return (self.workers[name] for name in ledger.accounts)

    def staying(self, ledger: DeviceLedger) -> list[GpuWorker]:
        """Those that are not about to end."""
        return [worker for worker in self.workers_on(ledger) if not worker.ending]

    def is_leaving(self, worker: GpuWorker) -> bool:
        """Whether it gets no more tests, as an older session needs what it keeps."""
        ledger = self.ledgers[worker.device]
        others = ledger.reading.others
        is_asked = bool(others.owed or others.lacks)
        worker.leaves = worker.leaves and is_asked and len(self.staying(ledger)) > 1
        return worker.leaves

    def note_change(self, device: str = "") -> None:
        """Something changed on a device, or everywhere."""
        if device and not self.has_several:
            self.changed.add(device)
        else:
            self.changed.update(self.ledgers)

    def take_changed(self) -> list[str]:
        """The devices on which something changed since this was asked last."""
        changed = sorted(self.changed)
        self.changed.clear()
        return changed

    @property
    def is_emptying(self) -> bool:
        """Whether a worker empties its caches."""
        return any(worker.emptying is not None for worker in self.workers.values())

    @property
    def is_waited_for(self) -> bool:
        """Whether a worker has nothing to run, or asks for what follows."""
        return (
            bool(self.waiting or self.raising)
            or any(self.idle.values())
            or any(worker.question for worker in self.workers.values())
            or self.is_emptying
        )

    @property
    def has_tests_to_send(self) -> bool:
        """Whether tests are left that no worker has been sent."""
        return bool(self.pending.count) or any(
            worker.bound is not None or worker.unit.tests for worker in self.workers.values()
        )

    # --- what is known of a test ---

    def set_largest(self, largest: Mapping[int, int]) -> None:
        """Set the largest need that any worker can meet, by the number of devices.

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

    def refuse(self, test: int, outcome: str, reason: str) -> None:
        """From now on this test is reported so, and needs nothing for that."""
        self.refusals[test] = outcome, reason
        self._needs[test] = Need(0, source="")

    def limit_unknown(self, test: int, most: int) -> None:
        """From now on a test of unknown need gets no more than so many bytes."""
        need = self._needs[test]
        if need.vram is None:
            slots = [worker.slot for worker in self.workers.values()]
            self._needs[test] = need._replace(vram=max(0, min([most, *slots])))

    def force(self, test: int, reason: str) -> None:
        """From now on this test starts as soon as nothing else runs on its devices."""
        self.forced[test] = reason

    def need(self, test: int) -> Need:
        """What is known of its need."""
        return self._needs[test]

    def kind_of(self, test: int) -> Kind:
        """How many devices the test wants, and whether alone."""
        return kind_of(self.need(test))

    def is_alone(self, test: int) -> bool:
        """Whether no other GPU test may run on the devices of this one."""
        return self._needs[test].exclusive or test in self.forced

    def devices(self, worker: GpuWorker, test: int) -> tuple[str, ...]:
        """The devices that a test uses in this worker."""
        return worker.devices[: self._needs[test].devices]

    def bytes_for(self, worker: GpuWorker, test: int) -> int:
        """Bytes on each device with which the test is admitted in this worker."""
        need = self._needs[test]
        if need.vram is not None:
            return need.vram
        return min(worker.slot, worker.most.get(need.devices, worker.slot))

    def has_left_behind(self, worker: GpuWorker) -> bool:
        """Whether processes have outlived tests on a device of this worker."""
        if len(worker.devices) == 1:
            return self.ledgers[worker.device].has_left_behind
        return any(self.ledgers[device].has_left_behind for device in worker.devices)

    def live_need(self, worker: GpuWorker, test: int, device: str) -> int:
        """Bytes that must be free on a device or held by the worker for this test to start.

        With what earlier tests left behind there, where the test has a need of its own: its process
        cannot use that.
        """
        need = self.bytes_for(worker, test)
        if self._needs[test].source == "slot":
            return need
        return need + self.ledgers[device].accounts[worker.id].left_behind

    def expected(self, test: int) -> float | None:
        """Seconds that the test should last; None: nobody knows."""
        known = self.jobs[test].duration
        return self.average if known is None else known

    def could(self, worker: GpuWorker, unit: Unit) -> bool:
        """Whether this worker can ever run all tests of the unit."""
        if worker.ending or not worker.knows(*unit.tests):
            return False
        if unit.wants is None and len(unit.tests) == 1:
            test = unit.tests[0]
            need = self._needs[test]
            return worker.most.get(need.devices, -1) >= (need.vram or 0) or test in self.forced
        if unit.wants is None:
            wants: dict[int, int] = {}
            for test in unit.tests:
                need = self.need(test)
                wants[need.devices] = max(wants.get(need.devices, 0), need.vram or 0)
            unit.wants = wants
        return all(worker.most.get(count, -1) >= vram for count, vram in unit.wants.items())

    def any_worker_can_run(self, unit: Unit) -> bool:
        """Whether any worker can ever run all tests of the unit."""
        return any(self.could(worker, unit) for worker in self.workers.values())

    def may_begin(self, worker: GpuWorker, unit: Unit) -> bool:
        """Whether the worker may begin it: none comes back to a group that it has left."""
        if unit.key and unit.key in worker.left_groups and unit.key != worker.last_group:
            # Unless nobody else can: a test must not be lost for a fixture's sake.
            for other in self.workers.values():
                fresh = unit.key not in other.left_groups or other.last_group == unit.key
                if other is not worker and fresh and self.could(other, unit):
                    return False
        return self.could(worker, unit)

    def first_for(self, worker: GpuWorker, *, unbarred: bool = False) -> Unit | None:
        """The first pending unit that it may ever begin; `unbarred`: that waits for no model."""

        def suits(unit: Unit) -> bool:
            is_barred = unbarred and self.bars(worker, unit.tests[0])
            return not is_barred and self.may_begin(worker, unit)

        return self.pending.first(worker.most, suits)

    # --- admission ---

    def largest_need(self, worker: GpuWorker, kind: Kind) -> int:
        """The largest need of this kind that may start in this worker now; -1: none.

        What the worker's own test holds comes back before its next one starts: it counts as free.
        """
        count, exclusive = kind
        if self.raising and worker.id not in self.raising:
            # A test that runs already and waits for more goes before those that have not begun.
            wanted = worker.devices[:count]
            if any(self.workers[other].device in wanted for other in self.raising):
                return -1
        if len(worker.devices) < count:
            return -1
        limits = []
        for device in worker.devices[:count]:
            ledger = self.ledgers[device]
            if exclusive and ledger.runs_beside(worker.id):
                return -1
            if self.exclusive and not self.exclusive.isdisjoint(
                ledger.running.keys() - {worker.id}
            ):
                return -1
            limits.append(ledger.limit(worker.id))
        return min(limits)

    def has_neighbours(self, worker: GpuWorker) -> bool:
        """Whether other tests run on its devices."""
        return any(self.ledgers[device].runs_beside(worker.id) for device in worker.devices)

    def assign(self, worker: GpuWorker, test: int, *, ahead: bool = False) -> bool:
        """Count a test as running in this worker. Returns whether it is alone on its devices.

        `ahead`: it was sent while the running one ends, and takes what is free now.
        """
        is_alone = self.is_alone(test)
        self.serial += 1
        worker.emptied = 0
        worker.sent.append(test)
        need = self.bytes_for(worker, test)
        if need or is_alone:
            for device in self.devices(worker, test):
                ledger = self.ledgers[device]
                before = ledger.running.get(worker.id)
                whole = self.live_need(worker, test, device) if need else 0
                ledger.start(worker.id, whole if before is None else max(whole, before.need))
                if ahead and before is not None:
                    ledger.keep_ahead(worker.id, max(whole, before.ahead))
        if is_alone:
            self.exclusive.add(worker.id)
        self.idle[worker.device].pop(worker.id, None)
        return is_alone

    def help_out(self, worker: GpuWorker, tests: Sequence[int]) -> None:
        """Count CPU tests as sent to this worker."""
        groups = [self.jobs[test].group for test in tests]
        worker.left_groups.update(filter(None, [worker.last_group, *groups]))
        worker.last_group, worker.helps_in = "", groups[-1]
        self.helped.update(tests)
        worker.sent += tests
        worker.deadline = None
        self.refresh(worker)

    def reserve(self, worker: GpuWorker, test: int) -> None:
        """Keep room for a test that is to start when the running one of this worker is over."""
        need = self.bytes_for(worker, test)
        for device in self.devices(worker, test):
            ledger = self.ledgers[device]
            running = ledger.running.get(worker.id)
            if running is not None and need > running.need:
                ledger.start(worker.id, need)

    def finish(
        self, worker: GpuWorker, test: int, held: Mapping[str, int] | None
    ) -> dict[str, int]:
        """A test of the worker is over; returns device -> bytes that should come back.

        `held`: device -> bytes that the worker holds now, as far as it is known.
        """
        worker.sent.remove(test)
        self.raising.pop(worker.id, None)
        if not worker.sent:
            worker.deadline = None
        if test in self.helped:
            self.helped.discard(test)
            ledger = self.ledgers[worker.device]
            if not worker.sent and worker.id in ledger.running:
                # It has acquired VRAM by itself.
                size = None if held is None else held.get(worker.device)
                return {worker.device: ledger.stop(worker.id, size)}
            return {}
        is_alone = self.is_alone(test)
        for device in worker.devices:
            if self.ledgers[device].accounts[worker.id].ahead:
                self.ledgers[device].keep_ahead(worker.id, 0)
                self.note_change(device)
        rest = [t for t in worker.sent if t not in self.helped] if self.helped else worker.sent
        if len(rest) > 1 and not is_alone and not self.has_several:
            # In a chain of short tests the largest need stands for all of them.
            return {}
        if is_alone and not any(map(self.is_alone, worker.sent)):
            self.exclusive.discard(worker.id)
        returned: dict[str, int] = {}
        for device in self.devices(worker, test):
            ledger = self.ledgers[device]
            if worker.id not in ledger.running:
                continue
            returned[device] = ledger.stop(worker.id, None if held is None else held.get(device))
            here = [t for t in rest if device in self.devices(worker, t)]
            need = max((self.bytes_for(worker, t) for t in here), default=0)
            if need or (here and worker.id in self.exclusive):
                ledger.start(worker.id, need)
        return returned
