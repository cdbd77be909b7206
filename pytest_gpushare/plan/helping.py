"""GPU workers that have nothing to do run tests that need no GPU."""

from __future__ import annotations

from pytest_gpushare.plan.cpu_side import CpuSide
from pytest_gpushare.plan.gpu_side import GpuSide
from pytest_gpushare.plan.work import Run

LONG = 1.0
"""From this duration on, in seconds, no GPU test is to wait for a worker that helps out."""


class Helping:
    """Who helps out, and with which tests."""

    def __init__(self, gpu: GpuSide, cpu: CpuSide) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._helping: dict[str, list[int]] = {}

    def begin(self) -> list[Run]:
        """Tests for those that are free."""
        gpu, average = self._gpu, self._cpu.average
        if average is None or not self._cpu.waits:
            return []
        if gpu.pending.count and average > LONG:
            # A GPU test that could start soon would wait for this worker.
            return []
        runs = []
        for it in [it for free in gpu.free.values() for it in free.values()]:
            tests = [] if it.unit is not None else self._cpu.help(it)
            if tests:
                it.busy = True
                it.help_out([self._gpu.jobs[test].group for test in tests])
                gpu.refresh(it)
                self._helping[it.id] = list(tests)
                runs.append(Run(it.id, tuple(tests)))
        return runs

    def finished(self, worker: str, test: int) -> bool | None:
        """A test is over; returns whether that was the last one; None: it was no help."""
        tests = self._helping.get(worker)
        if tests is None:
            return None
        tests.remove(test)
        if tests:
            return False
        del self._helping[worker]
        return True

    def down(self, worker: str) -> list[int]:
        """The worker is gone; what it had, the test that it ran first."""
        return self._helping.pop(worker, [])
