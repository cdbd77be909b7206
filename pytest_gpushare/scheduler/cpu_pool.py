"""The CPU workers: deep queues, as xdist's own schedulers fill them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pytest_gpushare.scheduler.gpu_pool import GpuSide, GpuWorker
from pytest_gpushare.scheduler.queue import GROUPED, Unit, in_parts, in_units
from pytest_gpushare.scheduler.types import Action, Instead, Job, Policy, Run, Worker


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


LONG_TEST = 0.1
"""From this duration on xdist's `load` commits no test beyond the next one, in seconds."""
WORTH_HELP = 0.01
"""A GPU worker helps out where tests last as long on average; each costs it about 1 ms more."""
LOOKED_AT = 64
"""Tests among which one is searched that a GPU worker can help out with."""
AHEAD = 0.05
"""Under worksteal: seconds of work that are committed to a worker, as committed is not stolen."""


class CpuSide:
    """Tests that need no GPU, and those that must do without one."""

    def __init__(self, jobs: Sequence[Job], policy: Policy) -> None:
        self._jobs = jobs
        self._policy = policy
        self.workers: dict[str, CpuWorker] = {}
        self._pending: deque[int] = deque()
        self._units: deque[Unit] = deque()
        self._low: dict[str, CpuWorker] = {}
        self.verdicts: dict[int, tuple[str, str]] = {}
        """Test -> outcome and reason, where it is reported without being run."""
        self.notes: dict[int, str] = {}
        """GPU tests that run without a GPU, and why."""
        self._durations = [0.0, 0]

    def add(self, tests: Sequence[int]) -> None:
        """Tests to be run, in this order."""
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
        return bool(self._pending or self._units or any(it.own for it in self.workers.values()))

    @property
    def knows_all(self) -> bool:
        """Whether a CPU worker has collected every test."""
        return any(it.collected is None and not it.ending for it in self.workers.values())

    def could_run(self, *tests: int) -> bool:
        """Whether one CPU worker has collected these tests."""
        return any(not it.ending and all(map(it.knows, tests)) for it in self.workers.values())

    def _could_run_whole(self, unit: Unit) -> bool:
        return self.could_run(*unit.tests)

    def up(self, worker: Worker, collected: Collection[int] | None) -> None:
        """A worker is ready."""
        self.workers[worker.id] = it = CpuWorker(worker, collected)
        self._low[worker.id] = it

    def down(self, worker: str) -> list[int]:
        """A worker is gone; what it had begun or not, the one that it ran first."""
        it = self.workers.pop(worker)
        self._low.pop(worker, None)
        self._pending.extendleft(reversed(it.own))
        return it.queue

    def finished(self, worker: str, test: int, duration: float | None) -> bool:
        """A test is over. Returns whether the worker wants more."""
        it = self.workers[worker]
        it.queue.remove(test)
        if duration is not None:
            self._durations[0] += duration
            self._durations[1] += 1
        if self._wants(it, duration):
            self._low[worker] = it
            return True
        return False

    def orphans(self) -> list[int]:
        """Take out the tests that no CPU worker can run any more."""
        if self.knows_all:
            return []
        found: list[int] = []
        queues: list[MutableSequence[int]] = [self._pending, *(unit.tests for unit in self._units)]
        for queue in [*queues, *(it.own for it in self.workers.values())]:
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
        total, count = self._durations
        return total / count if count else None

    def _wants(self, it: CpuWorker, duration: float | None) -> bool:
        held = len(it.queue)
        if self._policy.dist in GROUPED:
            return held < 2
        if self._policy.dist == "worksteal":
            return held < self._depth() or (held < 2 and not it.flushed)
        if not self._pending:
            return held < 2
        least = max(2, len(self._pending) // max(1, len(self.workers)) // 4)
        return held < least and not ((duration or 0) >= LONG_TEST and held >= 2)

    def _depth(self) -> int:
        average = self.average
        return 2 if average is None else min(200, max(1, int(AHEAD / max(average, 1e-4)) + 1))

    def refill(self) -> Iterator[Action]:
        """More for the workers that want it; where nothing is left, the word that this is all."""
        low, self._low = self._low, {}
        if self._policy.dist == "worksteal" and self._pending:
            self._divide()
        for it in low.values():
            if it.ending:
                continue
            tests = self._next(it)
            if tests:
                yield from self._send(it, tests)
            elif it.queue and not it.flushed and len(it.queue) < 2:
                # What waits is not for it.
                it.flushed = True
                yield Run(it.worker.id, ())

    def flush(self) -> Iterator[Action]:
        """Where nothing waits any more, each worker is told to start the last that it has."""
        if self.waits:
            return
        for it in self.workers.values():
            if it.queue and not it.flushed and not it.ending:
                it.flushed = True
                yield Run(it.worker.id, ())

    def _send(self, it: CpuWorker, tests: Sequence[int]) -> Iterator[Action]:
        """The tests, split where one is only reported."""
        first = not it.queue
        it.queue.extend(tests)
        it.flushed = not self.waits or (len(it.queue) < 2 and first)
        part: list[int] = []
        for test in tests:
            special = test in self.verdicts or test in self.notes
            if special and part:
                yield Run(it.worker.id, tuple(part), last=False)
                part = []
            if test in self.verdicts:
                yield Instead(it.worker.id, test, *self.verdicts.pop(test))
            elif special:
                note = self.notes.pop(test)
                yield Run(it.worker.id, (test,), last=False, note=note)
            else:
                part.append(test)
        if part or it.flushed:
            yield Run(it.worker.id, tuple(part), last=it.flushed)

    def _next(self, it: CpuWorker) -> list[int]:
        if self._policy.dist in GROUPED:
            return self._next_unit(it)
        if self._policy.dist == "worksteal":
            return self._next_of_own(it)
        count = max(2, len(self._pending) // max(1, len(self.workers)) // 2) - len(it.queue)
        most = max(2 - len(it.queue), self._policy.chunk or len(self._jobs))
        if len(self._pending) < 2 * len(self.workers):
            # One for each first: two for one would leave another one idle.
            count = min(count, 1)
        return self._known(it, self._pending, min(count, most))

    def _next_unit(self, it: CpuWorker) -> list[int]:
        tests: list[int] = []
        while len(it.queue) + len(tests) < 2:
            known = (unit for unit in self._units if all(map(it.knows, unit.tests)))
            unit = next(known, None)
            if unit is None:
                break
            self._units.remove(unit)
            tests.extend(unit.tests)
        return tests

    def _next_of_own(self, it: CpuWorker) -> list[int]:
        count = self._depth() - len(it.queue)
        tests = self._known(it, it.own, count)
        if not tests and not it.own:
            richest = max(self.workers.values(), key=lambda other: len(other.own))
            taken = [richest.own.pop() for _ in range((len(richest.own) + 1) // 2)]
            it.own.extend(test for test in reversed(taken) if it.knows(test))
            richest.own.extend(test for test in reversed(taken) if not it.knows(test))
            tests = self._known(it, it.own, count)
        return tests

    def _divide(self) -> None:
        """Under worksteal each worker gets a share of neighbouring tests."""
        workers = [it for it in self.workers.values() if not it.ending]
        for number, it in enumerate(workers):
            share = -(-len(self._pending) // (len(workers) - number))
            it.own.extend(self._known(it, self._pending, share))

    def _known(self, it: CpuWorker, pending: deque[int], count: int) -> list[int]:
        """The first `count` tests that the worker has collected, taken out."""
        if it.collected is None:
            return [pending.popleft() for _ in range(min(max(0, count), len(pending)))]
        tests = list(islice(filter(it.knows, pending), max(0, count)))
        for test in tests:
            pending.remove(test)
        return tests

    def help(self, it: GpuWorker) -> list[int]:
        """Tests for a GPU worker that has nothing to do, in the order of collection.

        So its fixtures are set up no more often than in a worker of xdist's `load`: that takes
        neighbouring tests in this order, too. Under worksteal from the end, as it is there.
        """
        average = self.average
        if average is None or average < WORTH_HELP or not self.waits:
            return []
        if self._policy.dist in GROUPED:
            return self._whole_unit(it)
        pending = self._pending
        if self._policy.dist == "worksteal" and not pending:
            pending = max((it.own for it in self.workers.values()), key=len, default=pending)
        count = max(1, min(int(LONG_TEST / average), len(pending) // (2 * len(self.workers) + 2)))
        tests: list[int] = []
        if self._policy.dist == "worksteal":
            while pending and len(tests) < count and self._suits(it, pending[-1]):
                tests.append(pending.pop())
            return tests[::-1]
        at = 0
        while at < min(len(pending), LOOKED_AT) and not self._suits(it, pending[at]):
            at += 1
        while at < len(pending) and len(tests) < count and self._suits(it, pending[at]):
            tests.append(pending[at])
            del pending[at]
        return tests

    def _suits(self, it: GpuWorker, test: int) -> bool:
        """Whether the test is one that this GPU worker can help out with."""
        known = it.knows(test) and test not in self.verdicts and test not in self.notes
        return known and it.helps_with(self._jobs[test].group)

    def _whole_unit(self, it: GpuWorker) -> list[int]:
        for unit in reversed(self._units):
            if all(self._suits(it, test) for test in unit.tests):
                self._units.remove(unit)
                return list(unit.tests)
        return []


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
