"""A GPU worker, as the dispatcher sees it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pytest_gpushare.plan.units import Unit
from pytest_gpushare.plan.work import Worker


@dataclass(eq=False)
class GpuWorker:
    """What a GPU worker is doing."""

    worker: Worker
    collected: Collection[int] | None
    test: int | None = None
    """The GPU test that it runs, or the last of the tests that it helps out with."""
    unit: Unit | None = None
    """What it has begun."""
    serial: int = 0
    """The number of the admission of its test."""
    busy: bool = False
    ending: bool = False
    emptying: float | None = None
    """Since when it has been emptying its caches."""
    emptied: int = 0
    """How much it did of that since its last test: 1 caches, 2 fixtures too."""
    left_groups: set[str] = field(default_factory=set)
    last_group: str = ""

    @property
    def is_free(self) -> bool:
        """Whether it can be given something to do."""
        return not (self.busy or self.ending or self.emptying is not None)

    def knows(self, test: int) -> bool:
        """Whether it has collected the test."""
        return self.collected is None or test in self.collected
