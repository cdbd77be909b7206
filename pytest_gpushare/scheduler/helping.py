"""What GPU workers do beside GPU tests: CPU tests while idle; short tests are taken back."""

from __future__ import annotations

from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.types import Recall, Run

LONG_HELP = 1.0
"""From this duration on, in seconds, no GPU test is to wait for a worker that helps out."""


class Helping:
    """Gives GPU workers CPU tests, and takes tests back that wait behind a long one."""

    def __init__(self, pool: GpuPool, cpu: CpuPool) -> None:
        self._pool = pool
        self._cpu = cpu

    def help(self, worker: GpuWorker) -> Run | None:
        """CPU tests for a GPU worker that has nothing to do."""
        pool, average = self._pool, self._cpu.average
        if not self._cpu.waits or (worker.unit is not None and worker.unit.tests):
            return None
        if pool.pending.count and (average is None or average > LONG_HELP):
            # A GPU test that could start soon would wait for this worker.
            return None
        tests = self._cpu.help(worker)
        if not tests:
            return None
        worker.help_out([pool.jobs[test].group for test in tests])
        pool.helped.update(tests)
        worker.sent += tests
        worker.deadline = None
        pool.refresh(worker)
        return Run(worker.id, tuple(tests))

    def help_all(self) -> list[Run]:
        """CPU tests for the idle GPU workers."""
        if self._cpu.average is None or not self._cpu.waits:
            return []
        idle = [worker for idle in self._pool.idle.values() for worker in idle.values()]
        return [run for worker in idle if (run := self.help(worker)) is not None]

    def recall(self) -> list[Recall]:
        """Take back short tests behind one that lasts, where others may run them."""
        pool = self._pool
        if len(pool.workers) < 2:
            return []
        late = [
            worker for worker in pool.workers.values()
            if worker.deadline is not None and worker.deadline <= pool.at and len(worker.sent) > 2
        ]  # fmt: skip
        for worker in late:
            worker.deadline = None
        return [Recall(worker.id) for worker in late]

    @property
    def next_deadline(self) -> float | None:
        """When short tests of some worker should long be over."""
        if len(self._pool.workers) < 2:
            return None
        found = [
            worker.deadline for worker in self._pool.workers.values() if worker.deadline is not None
        ]
        return min(found, default=None)
