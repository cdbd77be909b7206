"""A CPU worker, as the dispatcher sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from pytest_gpushare.plan.work import Worker


@dataclass(eq=False)
class CpuWorker:
    """What a CPU worker has to do."""

    worker: Worker
    collected: Collection[int] | None
    queue: list[int] = field(default_factory=list)
    """Sent and not finished, in order."""
    own: deque[int] = field(default_factory=deque)
    """Under worksteal: its share, not sent yet; others may take from its end."""
    flushed: bool = True
    """Whether it will start the last test that it has."""
    ending: bool = False

    def knows(self, test: int) -> bool:
        """Whether it has collected the test."""
        return self.collected is None or test in self.collected
