"""A GPU worker, as the dispatcher sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pytest_gpushare.plan.groups import IN_ORDER
from pytest_gpushare.plan.units import Unit
from pytest_gpushare.plan.work import Room, Worker


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
