"""The tests of the run as reported to the controller: where, when, how, with what VRAM.

Outcomes are those that pytest counts. A record is small, since a run may have 100,000.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from pytest_gpushare.events import Record
from pytest_gpushare.planning.placement import NUMBER
from pytest_gpushare.session.workers import LEAST_BY_NVML, Peak, WorkerRecord, Workers, higher
from pytest_gpushare.wire import ITSELF

MOST_TESTS = 250_000
"""Beyond so many, tests are counted and not kept."""

_MOST_BYTES = 2**50
_LONGEST = 500
_OWN_NEEDS = ("marker", "rule", "learned")
_OUTCOMES = ("passed", "failed", "skipped")
"""Of a report. Plugins that run tests again have words of their own for one that will be."""
_RANKS = ("passed", "xpassed", "xfailed", "skipped", "failed", "error", "crashed")


class PhaseReport(NamedTuple):
    """What pytest's report says of one phase of a test."""

    nodeid: str
    when: str
    """`setup`, `call`, `teardown`; anything else is xdist's word for a crash."""
    outcome: str
    expected_to_fail: bool = False
    start: float = 0.0
    """Seconds since the run started; by the clock of the worker's host."""
    end: float = 0.0
    marked: bool = False
    """Whether it has the marker of GPU tests."""


class Counted(NamedTuple):
    """What the frameworks' counters said of a test."""

    peak: Peak | None
    left: int | None
    """Bytes; negative where it gave back what earlier tests had left."""
    touched: bool | None


class RecordedTest:
    """One test: its last attempt, and the highest peak of all attempts."""

    __slots__ = ("again", "attempts", "end", "left", "marked", "nodeid", "outcome", "peak", "start",
                 "touched", "worker")  # fmt: skip
    __test__ = False

    def __init__(self, nodeid: str, worker: str, marked: bool) -> None:
        self.nodeid = nodeid
        self.worker = worker
        self.marked = marked
        self.outcome = "passed"
        self.start: float | None = None
        self.end: float | None = None
        self.attempts = 0
        self.again = False
        """Whether this attempt failed and another one is to follow."""
        self.peak: Peak | None = None
        self.left: int | None = None
        """Bytes that it left behind when it ended, by the frameworks' counters."""
        self.touched: bool | None = None
        """Whether it used VRAM by the frameworks' counters; None where they do not say."""


class RecordedTests:
    """All tests; written to by the main thread and by those that receive from workers."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._tests: list[RecordedTest] = []
        self._open: dict[tuple[str, str], RecordedTest] = {}
        self._last: dict[str, RecordedTest] = {}
        """Worker -> its last test that has ended."""
        self._measured: dict[tuple[str, str], Counted] = {}
        self._looked_at: dict[tuple[str, str], Peak] = {}
        """What NVML showed a worker of itself while a test ran there."""
        self.needs: dict[str, tuple[int, str]] = {}
        """Node id -> bytes that a test was admitted for, and who says so: marker, rule, learned or
        slot."""
        self.waits: dict[str, float] = {}
        """Node id -> seconds that a test waited, before it started, for VRAM or for its model."""
        self.remarks: dict[str, list[str]] = {}
        """Node id -> remarks for the report."""
        self.counts: Counter[str] = Counter()
        """Outcome -> tests."""
        self.total = 0
        """Tests that were collected; 0 while that is unknown."""

    def __iter__(self) -> Iterator[RecordedTest]:
        with self._lock:
            return iter([*self._tests, *self._open.values()])

    @property
    def dropped(self) -> int:
        """Tests that were counted and not kept."""
        return max(0, sum(self.counts.values()) - len(self._tests))

    def record_if_passed(
        self, worker: str, nodeid: str, when: str | None, start: float, end: float, marked: bool
    ) -> bool:
        """Fast path for a phase that passed, as nearly all do; False: call `reported`.

        Each test comes here three times, so nothing is built or compared that a phase which passed
        does not need.
        """
        key = worker, nodeid
        with self._lock:
            test = self._open.get(key)
            if when == "setup":
                if test is None:
                    test = self._open[key] = RecordedTest(nodeid, worker, marked)
                test.attempts += 1
                test.start, test.outcome, test.again = start, "passed", False
            elif test is None or test.again or when not in ("call", "teardown"):
                return False
            test.end = end
            if when == "teardown":
                self._close(key, test)
        return True

    def reported(self, worker: str, report: PhaseReport) -> None:
        """Take a report of pytest."""
        key = worker, report.nodeid
        with self._lock:
            test = self._open.get(key)
            if test is None and report.when == "teardown" and self._is_late(worker, report):
                return
            if test is None:
                test = self._open[key] = RecordedTest(report.nodeid, worker, report.marked)
            if report.when not in ("setup", "call", "teardown"):
                test.outcome = "crashed"
                self._close(key, test)
                return
            if report.when == "setup":
                test.attempts += 1
                test.start, test.outcome, test.again = report.start, "passed", False
            test.end = report.end
            test.outcome = max(test.outcome, _outcome(report), key=_RANKS.index)
            test.again = test.again or report.outcome not in _OUTCOMES
            if report.when == "teardown" and not test.again:
                self._close(key, test)

    def _is_late(self, worker: str, report: PhaseReport) -> bool:
        """Whether this is of the last test's wider fixtures, torn down when it was over."""
        last = self._last.get(worker)
        if last is None or last.nodeid != report.nodeid:
            return False
        self.counts[last.outcome] -= 1
        last.outcome = max(last.outcome, _outcome(report), key=_RANKS.index)
        self.counts[last.outcome] += 1
        return True

    def measured(self, worker: str, message: Any) -> None:
        """Take what a worker counted around a test; what makes no sense is dropped."""
        member = self._workers.get(worker)
        if member is None or not isinstance(message, Mapping):
            return
        # No framework counts it.
        context = member.context
        nodeid, size, left = message["nodeid"], _bytes(message.get("peak")), message.get("left")
        process = _bytes(message.get("process"))
        counted = Counted(
            Peak(size + context, "frameworks", message.get("exact") is True) if size else None,
            left if type(left) is int and abs(left) < _MOST_BYTES else None,
            None if size is None else size > 0 and message.get("idle") is not True,
        )
        with self._lock:
            member.counted = higher(member.counted, counted.peak)
            if process:
                sure = message.get("process_exact") is True
                whole = Peak(process + context, "frameworks", sure)
                member.process = higher(member.process, whole)
            if counted.left is not None:
                member.left.ran(nodeid, counted.left)
            for text in message.get("notes") or ():
                self.remarks.setdefault(nodeid, []).append(str(text)[:_LONGEST])
            last = self._last.get(worker)
            if (worker, nodeid) not in self._open and last is not None and last.nodeid == nodeid:
                # The report was faster than the private channel.
                _give(last, counted)
            else:
                self._measured[worker, nodeid] = counted

    def looked_at(self, worker: str, message: Any, began_at: float) -> None:
        """Take what NVML showed a worker of its own process; what makes no sense is dropped.

        It is a lower bound of the test's peak. `began_at`: when the run started.
        """
        if not isinstance(message, Mapping) or not isinstance(message.get("nodeid"), str):
            return
        size, at, member = _bytes(message.get("held")), message.get("at"), self._workers.get(worker)
        if not size or not isinstance(at, float) or member is None:
            return
        self._workers.looked_at(member, at - began_at, size)
        key, peak = (worker, message["nodeid"]), Peak(size, "nvml", False)
        with self._lock:
            last = self._last.get(worker)
            if key not in self._open and last is not None and last.nodeid == key[1]:
                _raise(last, peak)
            else:
                self._looked_at[key] = higher(self._looked_at.get(key), peak) or peak

    def finish(self) -> None:
        """The run is over: what frameworks counted is a lower bound where they count not all."""
        for test in self:
            member = self._workers.get(test.worker)
            if test.peak is not None and member is not None and member.is_undercounted:
                test.peak = test.peak._replace(exact=False)

    def need(self, nodeid: str, size: int, source: str) -> None:
        """The VRAM that a test was admitted for, and who says so: marker, rule, learned, slot."""
        with self._lock:
            self.needs[nodeid] = size, source

    def waited(self, nodeid: str, seconds: float) -> None:
        """A test waited for its VRAM, or for its model, before it started."""
        with self._lock:
            self.waits[nodeid] = self.waits.get(nodeid, 0.0) + seconds

    def remark(self, nodeid: str, text: str) -> None:
        """Add a remark on this test for the report."""
        with self._lock:
            self.remarks.setdefault(nodeid, []).append(text)

    @property
    def has_own_needs(self) -> bool:
        """Whether a test was admitted by another need than its worker's slot."""
        return any(source in _OWN_NEEDS for _, source in list(self.needs.values()))

    @property
    def largest_own_need(self) -> int:
        """Bytes of the largest such need; 0: there is none."""
        needs = list(self.needs.values())
        return max((size for size, source in needs if source in _OWN_NEEDS), default=0)

    def _close(self, key: tuple[str, str], test: RecordedTest) -> None:
        del self._open[key]
        self._last[test.worker] = test
        self.counts[test.outcome] += 1
        if len(self._tests) < MOST_TESTS:
            self._tests.append(test)
        counted = self._measured.pop(key, None)
        if counted is not None:
            _give(test, counted)
        looked_at = self._looked_at.pop(key, None)
        if looked_at is not None:
            _raise(test, looked_at)
        member = self._workers.get(test.worker)
        # The controller reads NVML once a second: for most tests never.
        if member is not None and member.readings:
            _look_up(test, self._workers, member)


def _look_up(test: RecordedTest, workers: Workers, member: WorkerRecord) -> None:
    """Without counters: what NVML reported while the test ran, where it was read in that time."""
    if test.start is None or test.end is None:
        return
    _raise(test, workers.peak_between(member, test.start, test.end))


def _raise(test: RecordedTest, seen: Peak | None) -> None:
    # Caches of earlier tests are in NVML's figure: where the frameworks counted, they know better.
    if test.peak is None or test.peak.source == "nvml":
        test.peak = higher(test.peak, seen)


def _give(test: RecordedTest, counted: Counted) -> None:
    if test.peak is None or test.peak.source == "nvml":
        test.peak = counted.peak or test.peak
    else:
        test.peak = higher(test.peak, counted.peak)
    test.left, test.touched = counted.left, counted.touched


def _outcome(report: PhaseReport) -> str:
    if report.expected_to_fail and report.when == "call":
        return {"skipped": "xfailed", "passed": "xpassed"}.get(report.outcome, "failed")
    if report.expected_to_fail and report.outcome == "skipped":
        return "xfailed"
    if report.outcome not in ("passed", "skipped"):
        return "failed" if report.when == "call" else "error"
    if report.outcome == "skipped":
        return "skipped"
    return "passed"


def _bytes(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_BYTES else None


_MOST_SUSPECTS = 20


class Leak(NamedTuple):
    """What was left, and by which test."""

    size: int
    """Bytes."""
    worker: str
    source: str
    """`frameworks`: their counters around each test; `nvml`: readings a second apart."""
    suspects: tuple[str, ...]
    """Node ids: one where it is known which test it was, else the first of those that may be."""
    among: int = 1
    """How many these are."""


def leaks(tests: Iterable[RecordedTest], workers: Iterable[WorkerRecord]) -> list[Leak]:
    """All leaks, the largest first."""
    known = list(tests)
    found = [leak for member in workers for leak in _of(member, known)]
    return sorted(found, key=lambda leak: (-leak.size, leak.suspects))


def _of(member: WorkerRecord, tests: Sequence[RecordedTest]) -> Iterator[Leak]:
    if member.left.is_reported:
        for nodeid, size in member.left.leaks():
            yield Leak(size, member.id, "frameworks", (nodeid,))
        return
    size = (member.kept or 0) - member.context
    if size <= LEAST_BY_NVML:
        return
    # Readings a second apart do not separate what one test left from what the next one took:
    # any test may have done it that ended after the last reading that was low.
    candidates = [
        test
        for test in tests
        if test.worker == member.id and test.end is not None and test.end >= member.low_at
    ]
    # A test that was skipped did nothing, where others ran.
    ran = [test for test in candidates if test.outcome != "skipped"]
    suspects = [test.nodeid for test in ran or candidates]
    if suspects:
        yield Leak(size, member.id, "nvml", tuple(suspects[:_MOST_SUSPECTS]), len(suspects))


class Observer:
    """Hooks that follow the workers and the tests; registered only where a plan was made."""

    def __init__(
        self,
        workers: Workers,
        tests: RecordedTests,
        record: Record,
        marker: str,
        shift_of: Callable[[str], float] | None = None,
    ) -> None:
        """`shift_of`: seconds to add to a worker's times; None: all have this host's clock."""
        self._shift_of = shift_of
        self._workers, self._record, self._marker = workers, record, marker
        self._began = record.began_at
        self._passed, self._other = tests.record_if_passed, tests.reported
        self._tests = tests

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The process itself has collected its tests; where there are workers, none."""
        self._tests.total = max(self._tests.total, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """A worker has collected its tests."""
        self._tests.total = max(self._tests.total, len(ids))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to start."""
        number = node.gateway.spec.env.get(NUMBER, "")
        self._workers.join(
            node.gateway.id, int(number) if number.isdigit() else None, self._record.now()
        )

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has finished, or died."""
        crashed = error is not None and not hasattr(node, "workeroutput")
        self._workers.leave(node.gateway.id, self._record.now(), crashed=crashed)
        if crashed:
            self._record.note(
                "worker-crashed", f"{node.gateway.id} crashed", worker=node.gateway.id
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test has ended."""
        node = getattr(report, "node", None)
        worker = ITSELF if node is None else node.gateway.id
        began = self._began if self._shift_of is None else self._began - self._shift_of(worker)
        start, end = report.start - began, report.stop - began
        marked = self._marker in report.keywords
        expected_to_fail = hasattr(report, "wasxfail")
        if (
            report.outcome == "passed"
            and not expected_to_fail
            and self._passed(worker, report.nodeid, report.when, start, end, marked)
        ):
            return
        self._other(
            worker,
            PhaseReport(
                report.nodeid,
                str(report.when),
                report.outcome,
                expected_to_fail,
                start,
                end,
                marked,
            ),
        )
