"""What each test of a GPU process takes: measured around its protocol, sent to the controller."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.pytest_items import kept_errors
from pytest_gpushare.planning.caps import cap_of
from pytest_gpushare.units import MB
from pytest_gpushare.worker import counters
from pytest_gpushare.worker.framework_caps import TorchCap
from pytest_gpushare.worker.oom_retry import Retry
from pytest_gpushare.worker.own_vram import OwnVram, own_children, reaped
from pytest_gpushare.worker.runner import NEED

if TYPE_CHECKING:
    from pytest_gpushare.wire import Link


class StartBarrier:
    """Keeps the next test back while another worker has the device to itself.

    The main thread enters before a test and leaves after it; requests come in the thread that
    receives. Whatever is done at rest is done with the lock held, so no test starts meanwhile.
    """

    def __init__(
        self, send: Callable[[str, Any], object], give_back: Callable[[], int | None]
    ) -> None:
        self._send = send
        self._give_back = give_back
        """Empties caches; returns the bytes that are held still, None where unknown."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._running = False
        self._pause: int | None = None
        """The number of the request to rest; None: tests may run."""
        self._open_for_good = False

    def enter(self) -> None:
        """Before a test: wait while the device is another's."""
        with self._lock:
            while self._pause is not None and not self._open_for_good:
                self._changed.wait()
            self._running = True

    def leave(self) -> None:
        """After a test: obey what was asked for meanwhile."""
        with self._lock:
            self._running = False
            if self._pause is not None:
                self._rest()

    def pause(self, number: int) -> None:
        """Rest from the end of the running test on, and say so under this number."""
        with self._changed:
            self._pause = number
            if not self._running:
                self._rest()

    def resume(self, number: int) -> None:
        """Go on, if the request to rest was this one."""
        with self._changed:
            if self._pause == number:
                self._pause = None
                self._changed.notify_all()

    def open(self, _payload: object = None) -> None:
        """The controller is gone: nobody would ever say when to go on."""
        with self._changed:
            self._open_for_good = True
            self._changed.notify_all()

    def _rest(self) -> None:
        self._send("quiet", {"number": self._pause, "held": self._give_back()})


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
    retry = Retry(link, cap, memory, own)
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
            figures = counters.measured(None, counters.counts())
            if figures is not None:
                setattr(report, self._NAME, _message_of(figures))
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
        forked = None if self._forked is None else self._forked.take()
        if after is None and forked is None:
            return
        # No framework here counts what other processes held for the test.
        cost, children = reaped(), own_children()
        alone = cost == self._reaped[-1] and not children
        if not self._ran_others and (children or cost != self._reaped[0]):
            self._ran_others = True
            self._link.send("ran-others", item.nodeid)
        # A framework in an odd state must not fail the test that is over.
        with contextlib.suppress(Exception):
            measured = forked or self._measured(before, after, fixtures, alone)
            if measured is not None:
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
                        **measured,
                    },
                )

    def _measured(
        self,
        before: counters.Counts | None,
        after: counters.Counts | None,
        fixtures: int,
        alone: bool,
    ) -> dict[str, Any] | None:
        figures = counters.measured(before, after)
        if figures is None:
            return None
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
