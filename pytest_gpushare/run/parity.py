"""No test is lost silently: what one kind of worker skips or misses, and the other would run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pytest_gpushare.run.jobs import Weighed
from pytest_gpushare.run.suite import Crew

_SPEAKS_OF_GPU = re.compile(
    r"gpu|cuda|nvidia|nvml|vram|nccl|cudnn|cupy|triton|accelerator|(no|needs?|requires?) device",
    re.I,
)


class Skip(NamedTuple):
    """A test that skipped itself on a CPU worker, for want of a GPU as far as its reason tells."""

    nodeid: str
    reason: str


class Parity:
    """Compares the kinds of worker; a plugin of pytest while the own dispatch lasts."""

    def __init__(self, weighed: Weighed, crew: Crew) -> None:
        on_gpu = {number for collection, _ in crew.on_gpu for number in collection.numbers}
        on_cpu = {number for collection, _ in crew.on_cpu for number in collection.numbers}
        self.has_cpu_workers = bool(crew.on_cpu)
        self.gpu_tests = sum(job.marked for job in weighed.jobs)
        self.tests = len(weighed.jobs)
        self.by_skip = [weighed.jobs[number].nodeid for number in weighed.by_skip]
        """Tests that markers skip without a GPU; they went to GPU workers."""
        self.only_on_gpu = len(on_gpu - on_cpu) if crew.on_cpu else 0
        """How many tests only GPU workers collected, and ran."""
        self.only_on_cpu = len(on_cpu - on_gpu) if crew.on_gpu else 0
        self._unmarked = {job.nodeid for job in weighed.jobs if not job.marked}
        self._workers: dict[str, bool] = {}
        self._on_cpu: dict[str, tuple[Any, ...]] = {}
        self._on_gpu: set[tuple[Any, ...]] = set()

    def worker_up(self, worker: str, *, has_gpu: bool) -> None:
        """A worker will report tests."""
        self._workers[worker] = has_gpu

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remember where tests skip, and why; most do not."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        where = report.longrepr
        node = getattr(report, "node", None)
        if node is None or not isinstance(where, (tuple, list)) or len(where) != 3:
            return
        if self._workers.get(node.gateway.id):
            self._on_gpu.add(tuple(where))
        elif report.nodeid in self._unmarked:
            self._on_cpu[report.nodeid] = tuple(where)

    @property
    def lost(self) -> Sequence[Skip]:
        """Tests that skipped on CPU workers, and that GPU workers would run.

        That a test skips in its body or in a fixture shows only when it runs. It counts as lost
        where its reason speaks of a GPU, unless a GPU worker was told the same at that place.
        """
        return [
            Skip(nodeid, str(where[2]).removeprefix("Skipped: "))
            for nodeid, where in self._on_cpu.items()
            if where not in self._on_gpu and _SPEAKS_OF_GPU.search(str(where[2]))
        ]
