"""What each test of a GPU process takes: measured around its protocol, sent to the controller.

By the frameworks' counters, where a framework is up; else by what NVML shows of this process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.pytest_items import kept_errors
from pytest_gpushare.planning.caps import cap_of
from pytest_gpushare.units import MB
from pytest_gpushare.worker import counters
from pytest_gpushare.worker.framework_caps import TorchCap
from pytest_gpushare.worker.oom_retry import Retry, StartBarrier
from pytest_gpushare.worker.runner import NEED

if TYPE_CHECKING:
    from pytest_gpushare.gpu.readings import LiveVram
    from pytest_gpushare.wire import Link


WORTH_COLLECTING = 16 * MB
"""Bytes that a test leaves behind beyond which garbage is collected before it is blamed."""


def watch(
    config: pytest.Config, place: Mapping[str, Any], memory: Mapping[str, Any], link: Link
) -> None:
    """In a process that has a GPU: measure its tests, and let them share the device.

    `memory` is what the controller sends: the bytes of a CUDA context, and when caches are
    emptied.
    """
    cap = TorchCap(os.environ)
    may_empty = memory["empty_caches"] != "never"

    def give_back() -> int | None:
        if may_empty:
            counters.empty()
        return counters.held()

    barrier = StartBarrier(link.send, give_back)
    link.on("pause", barrier.pause)
    link.on("resume", barrier.resume)
    link.on("closed", barrier.open)
    slots = [uuid for uuid, _ in place["plan"]["slots"]]
    own = OwnVram(place["device"], max(1, slots.count(place["device"])), link)
    retry = Retry(link, cap, memory, own.look)
    plugins = config.pluginmanager
    forked = ForkedTests() if plugins.has_plugin("pytest_forked") else None
    if forked is not None:
        plugins.register(forked, "gpu-share-forked-tests")
    plugins.register(retry, "gpu-share-retry")
    meter = Meter(link, barrier, retry, cap, memory, own, forked)
    plugins.register(meter, "gpu-share-meter")
    loop = plugins.get_plugin("gpu-share-run-loop")
    if loop is not None:
        # Not when its first test is to start: others wait for the VRAM of that one.
        loop.when_idle = own.prepare
    config.add_cleanup(cap.watch())
    link.send("here", os.getpid())


class ForkedTests:
    """The plugin that brings what the child of a forked test measured to the worker.

    pytest-forked carries nothing out of the child but the attributes of its reports.
    """

    _NAME = "gpushare_figures"

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._figures: dict[str, Any] | None = None

    def take(self) -> dict[str, Any] | None:
        """What the last test's child measured; None where it had none."""
        figures, self._figures = self._figures, None
        return figures

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """In the child: add the figures to its last report."""
        report = yield
        if report.when == "teardown" and os.getpid() != self._pid:
            found = counters.counts()
            if found is not None:
                setattr(report, self._NAME, _message_of(counters.measured(None, found)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the worker: take them from it."""
        if self._NAME in vars(report):
            self._figures = vars(report).pop(self._NAME)


class Meter:
    """The plugin that measures; it sends nothing for tests during which no framework
    was initialised."""

    def __init__(
        self,
        link: Link,
        barrier: StartBarrier,
        retry: Retry,
        cap: TorchCap,
        memory: Mapping[str, Any],
        own: OwnVram,
        forked: ForkedTests | None = None,
    ) -> None:
        """`forked`: where pytest-forked is installed."""
        self._link = link
        self._own = own
        self._barrier = barrier
        self._retry = retry
        self._cap = cap
        self._context = int(memory["context"])
        self._empty_caches = str(memory["empty_caches"])
        self._forked = forked
        self._fixtures: dict[int, int] = {}
        """id of a fixture of a wider scope -> bytes by which its set-up grew what is in use,
        without those of the fixtures that were set up meanwhile."""
        self._children: dict[int, frozenset[int]] = {}
        """id of a fixture of a wider scope -> PIDs of the processes that its set-up started."""
        self._inside: list[int] = []
        """For each fixture that is being set up, the bytes of those set up inside it."""
        self._ran_others = False
        """Whether a test was seen to run other processes."""
        self._reaped: list[object] = []
        """What the processes cost that had been started and were over when the first test began,
        and when the last one did in which a framework could count."""
        self._errors: list[BaseException] = []
        self._outcome = "passed"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the test; before it, wait at the barrier while the device is another's."""
        # Outside of all others, so that no timeout counts the wait.
        self._barrier.enter()
        try:
            self._retry.begin()
            self._own.prepare()
            self._outcome = "passed"
            need = item.stash.get(NEED, None)
            if need is not None:
                self._cap.set(cap_of(need, self._context))
            fixtures = sum(self._fixtures.values())
            cap = self._cap.size
            before, start = counters.counts(reset=True), time.time()
            if not self._reaped or counters.may_count():
                # Only a framework's figures depend on it: most tests spare the system calls.
                self._reaped = [*self._reaped[:1], reaped()]
            try:
                return (yield)
            finally:
                self._retry.over(item, self._outcome)
                self._finish(item, before, start, fixtures, {"cap": cap, "need": need})
                self._cap.set(None)
        finally:
            self._barrier.leave()

    # Hooks that are called for each phase wrap nothing: that would cost three times as much.

    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """Keep what it raised until its frames are cleared."""
        self._retry.reports()
        if call.excinfo is not None and self._empty_caches != "never":
            self._errors.append(call.excinfo.value)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how it went."""
        if report.when == "setup" or self._outcome == "passed" or report.failed:
            self._outcome = report.outcome

    # An old-style wrapper: see `Retry`.

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, None]:
        """What a fixture of a wider scope takes is left behind by no test."""
        if fixturedef.scope == "function":
            yield
            return
        # None: no framework is up, and nothing is held. This fixture may be what brings it up.
        before, children = counters.used() or 0, own_children()
        self._inside.append(0)
        yield
        inside, after = self._inside.pop(), counters.used()
        self._keep(id(fixturedef), own_children() - children)
        if after is not None:
            grown = after - before
            if grown != inside:
                self._fixtures[id(fixturedef)] = grown - inside
            if self._inside:
                self._inside[-1] += grown

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """It has been torn down: what it does not give back is left behind from here on."""
        self._fixtures.pop(id(fixturedef), None)
        self._keep(id(fixturedef), frozenset())

    def _keep(self, fixture: int, children: frozenset[int]) -> None:
        """Send which processes the fixtures of wider scopes keep: no test has left them behind."""
        if children != self._children.get(fixture, frozenset()):
            self._children[fixture] = children
            self._link.send("kept", sorted(frozenset().union(*self._children.values())))

    def _finish(
        self,
        item: pytest.Item,
        before: counters.Counts | None,
        start: float,
        fixtures: int,
        limits: Mapping[str, int | None],
    ) -> None:
        end = time.time()
        if self._errors:
            errors, self._errors = self._errors, []
            # pytest shows the error of a failed class or module fixture again with the next test.
            kept = {id(e) for each in kept_errors(item) for e in counters.errors_of(each)}
            for error in errors:
                counters.clear_frames(error, kept)
            errors.clear()
        after = counters.counts()
        measured = None if self._forked is None else self._forked.take()
        if after is None and measured is None:
            return
        # No framework here counts what other processes held for the test.
        cost, children = reaped(), own_children()
        alone = cost == self._reaped[-1] and not children
        if not self._ran_others and (children or cost != self._reaped[0]):
            self._ran_others = True
            self._link.send("ran-others", item.nodeid)
        # A framework in an odd state must not fail the test that is over.
        with contextlib.suppress(Exception):
            if measured is None and after is not None:
                measured = self._measured(before, after, fixtures, alone)
            self._link.send(
                "test",
                {
                    "nodeid": item.nodeid,
                    "start": start,
                    "end": end,
                    "outcome": self._outcome,
                    **limits,
                    "attempts": self._retry.attempts,
                    "notes": [self._retry.note] if self._retry.note else [],
                    **(measured or {}),
                },
            )

    def _measured(
        self,
        before: counters.Counts | None,
        after: counters.Counts,
        fixtures: int,
        alone: bool,
    ) -> dict[str, Any]:
        figures = counters.measured(before, after)
        own = sum(self._fixtures.values()) - fixtures
        left = figures.grown - own
        if left > WORTH_COLLECTING and self._empty_caches != "never":
            # Cycles hold what nobody can reach any more: that is no leak.
            gc.collect()
            collected = counters.used()
            left -= figures.used - collected if collected is not None else 0
        kept = sum(figures.helds)
        if self._empty_caches == "always" and any(figures.peaks):
            counters.empty()
            kept = counters.held() or 0
        return {
            **_message_of(figures),
            "exact": figures.exact and alone,
            "process": figures.process,
            "process_exact": figures.process_exact,
            "held": kept,
            "left": left,
            "idle": counters.nothing_taken(before, after),
        }


def _message_of(figures: counters.Measured) -> dict[str, Any]:
    """The figures in the builtin types that execnet and marshal carry."""
    return {
        "peak": max(figures.peaks, default=0),
        "peaks": list(figures.peaks),
        "exact": figures.exact,
        "peak_source": "frameworks",
        "held": sum(figures.helds),
        "helds": list(figures.helds),
        "left": figures.grown,
    }


PER_SECOND, URGENT_PER_SECOND = 16, 4
"""Readings of a device by all its workers together: at the end of calls, and of tests that ran out
of memory."""

PAUSE_WITHOUT_VRAM = 0.25
"""Seconds to the next reading at least while the process holds nothing: most tests use no GPU."""

PATIENCE = 0.5
"""Seconds that a test may be delayed by a driver that does not answer: once in this process, as
nobody waits again until it has answered."""

_SELF = "self"
_MOST_BYTES = 64 * 1024
_WALL = 0x40000000
"""Linux's `__WALL`: children that end with another signal than SIGCHLD count, too."""


class OwnVram:
    """Reads by NVML what this process and its descendants hold on one device, and sends it.

    At the end of a test's call, before its teardown, and when a test has run out of memory. A
    process list takes milliseconds under a lock of the driver, so all workers of a device together
    read no more than 20 a second; tests in between stay without a figure.
    """

    def __init__(
        self,
        device: str,
        workers: int,
        link: Link,
        *,
        live: LiveVram | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`device` is a UUID, `workers` how many there are on it; `live` is for tests."""
        self._device, self._link, self._live, self._clock = device, link, live, clock
        self._pid = os.getpid()
        self._pause = {False: workers / PER_SECOND, True: workers / URGENT_PER_SECOND}
        self._next = dict.fromkeys(self._pause, float("-inf"))

    def prepare(self) -> None:
        """Before a test: open the driver's library, where no framework is there that would count.

        Not while the test runs, which may fork, or look at the threads of its process.
        """
        if self._live is None and not counters.may_count():
            # Where no thread can be started, the first reading opens it.
            with contextlib.suppress(RuntimeError):
                self._open().processes(0.0)

    def look(self, nodeid: str, *, urgent: bool = False) -> None:
        """Send what is held now as a lower bound of this test's peak; `urgent`: it ran out.

        Nothing is read where a framework counts, or where the last reading was too short ago.
        """
        now = self._clock()
        # A forked child has no thread that reads.
        if now < self._next[urgent] or os.getpid() != self._pid or counters.counts() is not None:
            return
        size = self._read()
        pause = self._pause[urgent]
        self._next[urgent] = now + (pause if size else max(pause, PAUSE_WITHOUT_VRAM))
        if size:
            self._link.send("own", {"nodeid": nodeid, "held": size, "at": time.time()})

    def _open(self) -> LiveVram:
        # Imported by the first test that may end without a framework's counters.
        from pytest_gpushare.gpu.readings import LiveVram
        from pytest_gpushare.gpu.vendors import OneDevice

        self._live = LiveVram(OneDevice(self._device), timeout=PATIENCE)
        return self._live

    def _read(self) -> int | None:
        """Bytes; None where the driver does not say in time."""
        from pytest_gpushare.gpu.attribution import Attribution

        live = self._live or self._open()
        asked = time.monotonic()
        reading = live.processes(0.0)
        if reading.at < asked:
            return None
        split = Attribution().split(reading.devices.get(self._device), {self._pid: _SELF})
        return None if split is None else split.workers.get(_SELF)


def own_children() -> frozenset[int]:
    """PIDs of the processes that this one has started and that live; empty where unknown."""
    found: set[int] = set()
    if not _has_children():
        return frozenset()
    # Threads and processes come and go meanwhile.
    with contextlib.suppress(OSError, ValueError):
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            with open(f"/proc/self/task/{thread}/children", "rb") as file:  # noqa: PTH123
                found.update(map(int, file.read(_MOST_BYTES).split()))
    return frozenset(found)


def _has_children() -> bool:
    """Whether there are any, by one system call; True where that is unknown."""
    if sys.platform != "linux":
        return True
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL
    try:
        os.waitid(os.P_ALL, 0, options)
    except ChildProcessError:
        return False
    except OSError:
        # Older kernels know `_WALL` only elsewhere.
        return True
    return True


def reaped() -> object:
    """What differs once a process that this one has started is over; always None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime, used.ru_minflt
