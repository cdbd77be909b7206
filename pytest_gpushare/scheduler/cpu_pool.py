"""CPU tests: deep queues on CPU workers, as xdist's own schedulers fill them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pytest_gpushare.scheduler.gpu_pool import GpuWorker
from pytest_gpushare.scheduler.queue import GROUPED, LONG_TEST, Unit, in_parts, in_units
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Job,
    Park,
    Policy,
    Run,
    Shutdown,
    Worker,
)


@dataclass(eq=False)
class CpuWorker:
    """What a CPU worker has to do."""

    id: str
    collected: Collection[int] | None
    sent: list[int] = field(default_factory=list)
    """Tests that are not over, in order."""
    share: deque[int] = field(default_factory=deque)
    """Under worksteal: its share, not sent yet; others may take from its end."""
    asks: bool = False
    """Whether it waits to be sent what follows the last test that it has."""
    ending: bool = False
    is_shallow: bool = False
    """Whether it gets one test at a time, as one that uses a model may be its next."""
    is_taken: bool = False
    """Whether it has a chain of tests of which some use a model, and gets nothing else."""

    def knows(self, *tests: int) -> bool:
        """Whether it has collected these tests."""
        return self.collected is None or all(test in self.collected for test in tests)


WORTH_HELP = 0.01
"""A GPU worker helps out where tests last as long on average; each costs it about 1 ms more."""
LOOKED_AT = 64
"""Tests among which one is searched that a GPU worker can help out with."""
AHEAD = 0.05
"""Under worksteal: seconds of work that are committed to a worker, since a committed test cannot be
taken back."""


class CpuPool:
    """Tests that need no GPU, and those that must do without one."""

    def __init__(self, jobs: Sequence[Job], policy: Policy) -> None:
        self._jobs = jobs
        self._policy = policy
        self.workers: dict[str, CpuWorker] = {}
        self._pending: deque[int] = deque()
        self._units: deque[Unit] = deque()
        self._low: dict[str, CpuWorker] = {}
        self.refusals: dict[int, tuple[str, str]] = {}
        """Test -> outcome and reason, where it is reported without being run."""
        self.notes: dict[int, str] = {}
        """GPU tests that run without a GPU, and why."""
        self.waited: dict[int, float] = {}
        """Seconds for which a GPU test waited for VRAM before it came here."""
        self.divert: Callable[[int], bool] | None = None
        """Takes tests that go elsewhere, as they use a model of Ollama's; None: there are none."""
        self._seconds, self._finished = 0.0, 0
        """How long tests have taken in all, and how many."""

    def add(self, tests: Sequence[int]) -> None:
        """Tests to be run, in this order."""
        if self.divert is not None:
            tests = [test for test in tests if not self.divert(test)]
        if self._policy.dist in GROUPED:
            units = in_parts(in_units(tests, self._jobs), self._could_run_whole)
            if self._policy.reorder:
                units.sort(key=lambda unit: -len(unit.tests))
            self._units.extend(units)
        else:
            self._pending.extend(tests)
        self._low.update(self.workers)

    @property
    def waits(self) -> bool:
        """Whether there are tests that no worker has."""
        return bool(
            self._pending or self._units or any(worker.share for worker in self.workers.values())
        )

    @property
    def knows_all(self) -> bool:
        """Whether a CPU worker has collected every test."""
        return any(
            worker.collected is None and not worker.ending for worker in self.workers.values()
        )

    def could_run(self, *tests: int) -> bool:
        """Whether one CPU worker has collected these tests."""
        return any(not worker.ending and worker.knows(*tests) for worker in self.workers.values())

    def _could_run_whole(self, unit: Unit) -> bool:
        return self.could_run(*unit.tests)

    def up(self, worker: Worker, collected: Collection[int] | None) -> None:
        """A worker is ready."""
        self.workers[worker.id] = self._low[worker.id] = CpuWorker(worker.id, collected)

    def down(self, worker: str) -> list[int]:
        """A worker is gone; returns what it was sent, the test that it ran first."""
        cpu_worker = self.workers.pop(worker)
        self._low.pop(worker, None)
        self._pending.extendleft(reversed(cpu_worker.share))
        return cpu_worker.sent

    def finished(self, worker: str, test: int, duration: float | None) -> bool:
        """A test is over. Returns whether the worker wants more."""
        cpu_worker = self.workers[worker]
        cpu_worker.sent.remove(test)
        if duration is not None:
            self._seconds += duration
            self._finished += 1
        wants = self._wants(cpu_worker, duration)
        if wants:
            self._low[worker] = cpu_worker
        return wants

    def take_unrunnable(self) -> list[int]:
        """Take out the tests that no CPU worker can run any more."""
        if self.knows_all:
            return []
        found: list[int] = []
        queues: list[MutableSequence[int]] = [self._pending, *(unit.tests for unit in self._units)]
        queues += [worker.share for worker in self.workers.values()]
        for queue in queues:
            lost = [test for test in queue if not self.could_run(test)]
            for test in lost:
                queue.remove(test)
            found += lost
        units = [unit for unit in self._units if unit.tests]
        self._units = deque(in_parts(units, self._could_run_whole))
        return found

    @property
    def average(self) -> float | None:
        """Seconds that a test lasts on average; None: unknown yet."""
        return self._seconds / self._finished if self._finished else None

    def _wants(self, worker: CpuWorker, duration: float | None) -> bool:
        held = len(worker.sent)
        if worker.is_shallow:
            return not held
        if self._policy.dist in GROUPED:
            return held < 2
        if self._policy.dist == "worksteal":
            return held < self._depth()
        if not self._pending:
            return held < 2
        least = max(2, len(self._pending) // max(1, len(self.workers)) // 4)
        return held < least and not ((duration or 0) >= LONG_TEST and held >= 2)

    def _depth(self) -> int:
        average = self.average
        return 2 if average is None else min(200, max(1, int(AHEAD / max(average, 1e-4)) + 1))

    def next_test_requested(self, worker: str, test: int) -> None:
        """A worker wants to know what follows this test, which was its last."""
        cpu_worker = self.workers[worker]
        if cpu_worker.sent[-1:] == [test]:
            cpu_worker.asks = True
            self._low[worker] = cpu_worker

    def refill(self, *, more_may_come: bool) -> Iterator[Action]:
        """More for the workers that want it; where nothing is left, what becomes of them."""
        low, self._low = self._low, {}
        if self._policy.dist == "worksteal" and self._pending:
            self._divide()
        for worker in low.values():
            if worker.ending or worker.is_taken:
                continue
            tests = self._next(worker)
            if tests:
                worker.asks = False
                worker.sent.extend(tests)
                yield Run(worker.id, tuple(tests), self._admissions(tests))
            elif worker.asks:
                worker.asks = False
                worker.ending = not more_may_come
                yield Park(worker.id) if more_may_come else Shutdown(worker.id)

    def _admissions(self, tests: Sequence[int]) -> Mapping[int, Admission]:
        if not (self.refusals or self.notes):
            return {}
        return {
            test: self.admission(test)
            for test in tests
            if test in self.refusals or test in self.notes
        }

    def admission(self, test: int) -> Admission:
        """What is to say of a test that begins here."""
        return Admission(
            waited=self.waited.pop(test, 0.0),
            note=self.notes.pop(test, ""),
            refusal=self.refusals.pop(test, None),
        )

    def _next(self, worker: CpuWorker) -> list[int]:
        if worker.is_shallow and worker.sent and not worker.asks:
            return []
        if self._policy.dist in GROUPED:
            return self._next_unit(worker)
        if self._policy.dist == "worksteal":
            return self._next_of_share(worker)
        count = max(2, len(self._pending) // max(1, len(self.workers)) // 2) - len(worker.sent)
        most = max(2 - len(worker.sent), self._policy.chunk or len(self._jobs))
        if worker.is_shallow:
            count = most = 1
        if len(self._pending) < 2 * len(self.workers):
            # One for each first: two for one would leave another one idle.
            count = min(count, 1)
        return self._known(worker, self._pending, min(count, most))

    def _next_unit(self, worker: CpuWorker) -> list[int]:
        tests: list[int] = []
        most = 1 if worker.is_shallow else 2
        while len(worker.sent) * (not worker.is_shallow) + len(tests) < most:
            known = (unit for unit in self._units if worker.knows(*unit.tests))
            unit = next(known, None)
            if unit is None:
                break
            self._units.remove(unit)
            tests.extend(unit.tests)
        return tests

    def _next_of_share(self, worker: CpuWorker) -> list[int]:
        # One that knows no next test tears down what that test uses, too.
        least = int(worker.asks)
        count = 1 if worker.is_shallow else max(least, self._depth() - len(worker.sent))
        tests = self._known(worker, worker.share, count)
        if not tests and not worker.share:
            richest = max(self.workers.values(), key=lambda other: len(other.share))
            taken = [richest.share.pop() for _ in range((len(richest.share) + 1) // 2)]
            worker.share.extend(test for test in reversed(taken) if worker.knows(test))
            richest.share.extend(test for test in reversed(taken) if not worker.knows(test))
            tests = self._known(worker, worker.share, count)
        return tests

    def _divide(self) -> None:
        """Under worksteal each worker gets a share of neighbouring tests."""
        workers = [worker for worker in self.workers.values() if not worker.ending]
        for number, worker in enumerate(workers):
            share = -(-len(self._pending) // (len(workers) - number))
            worker.share.extend(self._known(worker, self._pending, share))

    def _known(self, worker: CpuWorker, pending: deque[int], count: int) -> list[int]:
        """The first `count` tests that the worker has collected, taken out."""
        if worker.collected is None:
            return [pending.popleft() for _ in range(min(max(0, count), len(pending)))]
        tests = list(islice(filter(worker.knows, pending), max(0, count)))
        for test in tests:
            pending.remove(test)
        return tests

    def help(self, worker: GpuWorker) -> list[int]:
        """Tests for a GPU worker that has nothing to do, in the order of collection.

        So its fixtures are set up no more often than in a worker of xdist's `load`: that takes
        neighbouring tests in this order, too. Under worksteal from the end, as it is there.
        """
        average = self.average
        if (average is not None and average < WORTH_HELP) or not self.waits:
            return []
        if self._policy.dist in GROUPED:
            return self._whole_unit(worker)
        pending = self._pending
        if self._policy.dist == "worksteal" and not pending:
            pending = max(
                (worker.share for worker in self.workers.values()), key=len, default=pending
            )
        most = 1 if average is None else int(LONG_TEST / average)
        count = max(1, min(most, len(pending) // (2 * len(self.workers) + 2)))
        tests: list[int] = []
        if self._policy.dist == "worksteal":
            while pending and len(tests) < count and self._suits(worker, pending[-1]):
                tests.append(pending.pop())
            return tests[::-1]
        at = 0
        while at < min(len(pending), LOOKED_AT) and not self._suits(worker, pending[at]):
            at += 1
        while at < len(pending) and len(tests) < count and self._suits(worker, pending[at]):
            tests.append(pending[at])
            del pending[at]
        return tests

    def _suits(self, worker: GpuWorker, test: int) -> bool:
        """Whether the test is one that this GPU worker can help out with."""
        known = worker.knows(test) and test not in self.refusals and test not in self.notes
        return known and worker.helps_with(self._jobs[test].group)

    def _whole_unit(self, worker: GpuWorker) -> list[int]:
        for unit in reversed(self._units):
            if all(self._suits(worker, test) for test in unit.tests):
                self._units.remove(unit)
                return list(unit.tests)
        return []
