"""The run loop of a worker whose tests the controller hands out.

After a test's call, before its teardown, the worker requests the next test: so the teardown knows
it, and the controller decides as late as that. A test for whose need there is no room yet waits
here, between two protocols, outside of any time-out. So does one that acquires more VRAM while it
runs (`leases.acquire`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat import pytest_items
from pytest_gpushare.compat.xdist_events import Commands, Interactor, interactor_of
from pytest_gpushare.leases import DEFAULT_WAIT, LeaseUnavailable, set_need_hooks
from pytest_gpushare.scheduler.needs import written
from pytest_gpushare.units import format_gb
from pytest_gpushare.wire import spread
from pytest_gpushare.worker.collection import (
    REFUSAL,
    MarkerReader,
    Refusals,
    collected_tests,
    may_use_models,
)

if TYPE_CHECKING:
    from pytest_gpushare.wire import Link

_ANSWER_WITHIN = 10.0
"""Seconds for the controller's first answer."""


class RaisedNeed:
    """Asks the controller, which waits for tests of this run and of other sessions."""

    def __init__(
        self,
        on: Callable[[str, Callable[[Any], None]], object],
        ask: Callable[[int, int, bool], object],
    ) -> None:
        """`on` receives messages of a kind from the controller; `ask` sends it the number of a
        question, the bytes that are wanted, and whether less would do."""
        self._ask = ask
        self._answers: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._number = self._total = 0
        on("raised", self._answers.put)

    @contextlib.contextmanager
    def __call__(self, size: int, wait: float | None) -> Iterator[None]:
        """Have `size` bytes in this worker, with what blocks around this one have."""
        __tracebackhide__ = True
        self._raise_to(self._total + size, DEFAULT_WAIT if wait is None else wait)
        self._total += size
        try:
            yield
        finally:
            self._total -= size
            self._want(self._total)

    def _raise_to(self, size: int, wait: float) -> None:
        __tracebackhide__ = True
        self._want(size)
        asked, why = time.monotonic(), ""
        # The controller answers at once, with the reason where the test has to wait.
        while answer := self._answer(asked + (wait if why else max(wait, _ANSWER_WITHIN))):
            if answer["granted"]:
                return
            why = answer["text"]
            if answer["is_final"]:
                break
        self._want(self._total)
        waited = time.monotonic() - asked
        after = f" after {waited:.0f} s" if waited >= 1 else ""
        raise LeaseUnavailable(
            f"{format_gb(size)} of VRAM is not available for this test{after}"
            f"{': ' * bool(why)}{why}"
        )

    def most(self, size: int) -> int:
        """Have so many bytes until the test ends, or as many as are there; returns how many."""
        self._want(size, takes_less=True)
        answer = self._answer(time.monotonic() + _ANSWER_WITHIN)
        return size if answer is None else min(size, int(answer["size"]))

    def _want(self, size: int, *, takes_less: bool = False) -> None:
        self._number += 1
        self._ask(self._number, size, takes_less)

    def _answer(self, until: float) -> Mapping[str, Any] | None:
        """The next answer to the last question; None where none comes before then."""
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
                if answer["number"] == self._number:
                    return answer
        return None


NEED: pytest.StashKey[int] = pytest.StashKey()
"""Bytes with which the test was admitted; nothing where it has no need."""

_SHUTDOWN, _XDIST, _GONE = "shutdown", "xdist", "gone"
"""Not our messages: xdist ends this worker, or has another command; the controller is gone."""


class RunLoop:
    """Runs the tests that the controller sends, where it dispatches; else leaves it to xdist.

    Without a GPU only tests that use models leave something for the controller to decide.
    Messages are put into one queue in the order in which they arrive, in execnet's thread; all
    but a recall are obeyed in the main thread.
    """

    def __init__(self, config: pytest.Config, message: Mapping[str, Any], link: Link) -> None:
        self._config = config
        self._reader = MarkerReader(message)
        self._message = message
        self._link = link
        self._interactor = interactor_of(config)
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._queue: deque[int] = deque()
        """Tests that were sent and not begun, by index."""
        self._lock = threading.Lock()
        """Held where the next test becomes known, and where tests are given back."""
        self._waiting: int | None = None
        """The one of them that waits for its admission."""
        self._ahead = 0
        """Ask for what follows when one of the last so many of them starts."""
        self._asked: int | None = None
        """The test of which it was asked what follows, by index."""
        self._index = -1
        """The test that runs now or ran last; -1: none has run."""
        self._waited = 0.0
        """Seconds for which the test that runs now waited for the next one to be known."""
        self._parked = False
        """Whether nothing follows for now."""
        self._ending = False
        self._own = False
        """Whether the test that runs now is run by the protocol below."""
        self._looks_ahead: Callable[[pytest.Item], bool] = lambda _: True
        """Whether the next test must be known when a test starts."""
        self._items: Sequence[pytest.Item] = ()
        self.when_idle: Callable[[], object] = lambda: None
        """Called before it waits with nothing to run."""
        for kind in ("dispatch", "run", "admit", "park", "empty"):
            link.on(kind, partial(self._put, kind))
        link.on("recall", self._give_back)
        link.on("closed", partial(self._put, _GONE))

    def _put(self, kind: str, payload: Any = None) -> None:
        self._inbox.put((kind, payload))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Send what was collected before xdist does."""
        if self._message["absence"] and not may_use_models(self._message["ollama"], session.items):
            self._config.pluginmanager.unregister(self)
            return
        message = written(collected_tests(session.items, self._reader))
        self._link.send("collected", {**message, "loop": self._interactor is not None})

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run what is sent; None where xdist's own loop is to do it."""
        interactor = self._interactor
        if interactor is None:
            return None
        commands = interactor.listen(lambda ends: self._put(_SHUTDOWN if ends else _XDIST))
        if self._inbox.empty():
            self.when_idle()
        # Our own channel was open before: a shutdown does not overtake what was sent earlier.
        if self._inbox.get()[0] != "dispatch":
            commands.hand_over()
            return None
        raised = RaisedNeed(self._link.on, partial(interactor.send, "raise"))
        set_need_hooks(raised, raised.most)
        try:
            self._run(session, interactor, commands)
        finally:
            set_need_hooks(None)
        return True

    def _run(self, session: pytest.Session, interactor: Interactor, commands: Commands) -> None:
        commands.forget()
        self._items = session.items
        if pytest_items.run_phases is not None:
            self._looks_ahead = pytest_items.who_wants_the_next_test(session.config, self)
        while not (session.shouldfail or session.shouldstop):
            index = self._next_to_run(interactor)
            if index is None:
                break
            self._run_one(index, interactor)

    def _next_to_run(self, interactor: Interactor) -> int | None:
        """Wait for a test that may start; None: there will be none."""
        while not self._queue or self._queue[0] == self._waiting:
            if self._ending and not self._queue:
                return None
            if self._inbox.empty():
                self.when_idle()
            self._receive(interactor)
        return self._queue.popleft()

    def _receive(self, interactor: Interactor) -> None:
        kind, payload = self._inbox.get()
        if kind == "run":
            self._take(payload)
        elif kind == "admit":
            self._admit(payload)
        elif kind == "park":
            self._parked = True
        elif kind == "empty":
            if payload:
                self._queue.clear()
                self._waiting = None
                self._tear_down_all()
            interactor.send("emptied", _empty_caches())
        elif kind == _SHUTDOWN:
            self._ending = True
        elif kind == _GONE:
            self._ending, self._waiting = True, None
            self._queue.clear()

    def _take(self, payload: Mapping[str, Any]) -> None:
        tests = payload["tests"]
        for index, need in zip(tests, spread(*payload["needs"]), strict=True):
            if need is not None:
                self._items[index].stash[NEED] = need
        for index, refusal in payload["refusals"].items():
            self._refuse(self._items[index], refusal)
        self._ahead, self._asked, self._parked = payload["ahead"], None, False
        if not payload["admitted"]:
            self._waiting = tests[-1]
        self._queue.extend(tests)

    def _admit(self, payload: Mapping[str, Any]) -> None:
        item = self._items[payload["test"]]
        if payload["need"] is not None:
            item.stash[NEED] = payload["need"]
        if payload["refusal"]:
            self._refuse(item, payload["refusal"])
        self._waiting = None

    def _refuse(self, item: pytest.Item, refusal: Sequence[str]) -> None:
        outcome, reason = refusal
        item.stash[REFUSAL] = outcome, reason
        plugins = self._config.pluginmanager
        if not plugins.has_plugin("gpu-share-refusals"):
            # Most runs refuse nothing, and its hooks are called for each test.
            plugins.register(Refusals(), "gpu-share-refusals")

    def _give_back(self, _: object) -> None:
        """Return the tests that were not begun, but for the next one: the running one knows it."""
        # In execnet's thread: the main thread may be in the middle of a long test. It must not ask
        # for more before the controller receives this.
        with self._lock:
            returned = [self._queue.pop() for _ in range(len(self._queue) - 1)]
            if self._interactor is not None:
                self._interactor.send("returned", returned[::-1])

    def _ask(self, when: str, interactor: Interactor) -> None:
        """Ask what follows the last test that this worker has, but not twice."""
        with self._lock:
            last = self._queue[-1] if self._queue else self._index
            if self._asked != last and not self._ending:
                self._asked, self._parked = last, False
                interactor.send("asked", last, when)

    def _next_item(self, interactor: Interactor) -> pytest.Item | None:
        """The test that follows; None: none, or none that is known, so all is torn down."""
        start = time.perf_counter()
        while not (self._queue or self._parked or self._ending):
            self._receive(interactor)
        self._waited += time.perf_counter() - start
        return self._items[self._queue[0]] if self._queue else None

    def _run_one(self, index: int, interactor: Interactor) -> None:
        item = self._items[index]
        self._index = index
        interactor.begin(index)
        looks_ahead = not self._queue and self._looks_ahead(item)
        if looks_ahead or len(self._queue) < self._ahead:
            self._ask("start", interactor)
        with self._lock:
            follows = self._queue[0] if self._queue else None
        self._own = follows is None and not looks_ahead
        if follows is not None:
            nextitem: pytest.Item | None = self._items[follows]
        else:
            nextitem = None if self._own else self._next_item(interactor)
        start, self._waited = time.perf_counter(), 0.0
        self._config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        interactor.complete(index, time.perf_counter() - start - self._waited)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """As pytest itself runs a test, but the next one is requested after the call."""
        run_phases, interactor = pytest_items.run_phases, self._interactor
        if not self._own or run_phases is None or interactor is None:
            return None

        def ask() -> pytest.Item | None:
            if not self._queue:
                self._ask("end", interactor)
            return self._next_item(interactor)

        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        run_phases(item, ask)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _tear_down_all(self) -> None:
        """Tear down what was kept for a test that this worker does not run after all.

        The last test has been reported; only an error makes a second report of its teardown.
        """
        if self._index < 0:
            return
        item = self._items[self._index]
        try:
            pytest_items.tear_down_all(item.session)
        except (pytest.exit.Exception, KeyboardInterrupt):
            raise
        except BaseException:
            text = str(item.repr_failure(pytest.ExceptionInfo.from_current()))
            report = pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed",
                longrepr=text,
                when="teardown",
            )
            item.ihook.pytest_runtest_logreport(report=report)


def _empty_caches() -> list[int] | None:
    """What the frameworks hold then, by visible device; None where that is unknown."""
    from pytest_gpushare.worker import counters

    # Other people's finalizers may do anything.
    with contextlib.suppress(Exception):
        counters.empty()
    found = counters.counts()
    return None if found is None else list(counters.measured(None, found).helds)
