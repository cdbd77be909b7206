"""The run loop of a worker, on messages as the controller sends them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.compat import pytest_items
from pytest_gpushare.wire import Link, squeezed
from pytest_gpushare.worker import runner
from pytest_gpushare.worker.collection import REFUSAL
from pytest_gpushare.worker.runner import NEED, RunLoop

SETTINGS = {
    "marker": "gpu", "aliases": [], "rules": [], "gpu_unless_marked": False,
    "absence": "", "ollama": {"rules": [], "param": "", "only_model": "", "markers": []},
}  # fmt: skip


class Item:
    def __init__(self, number: int) -> None:
        self.number = number
        self.nodeid = f"t{number}"
        self.location = ("t.py", number, self.nodeid)
        self.keywords: dict[str, Any] = {}
        self.stash = pytest.Stash()
        self.reports: list[Any] = []
        self.session: Any = None
        self.ihook = SimpleNamespace(
            pytest_runtest_logstart=lambda **_: None,
            pytest_runtest_logfinish=lambda **_: None,
            pytest_runtest_logreport=lambda report: self.reports.append(report),
        )

    def __repr__(self) -> str:
        return self.nodeid

    def repr_failure(self, excinfo: Any) -> str:
        return str(excinfo.value)


class WorkerInteractor:
    """xdist's object; `answer` is called with what the loop says to the scheduler."""

    def __init__(self, answer: Callable[..., None]) -> None:
        self.item_index = -1
        self.complete: list[int] = []
        self.said: list[list[Any]] = []
        self._answer = answer
        self.channel = SimpleNamespace(setcallback=self._setcallback)
        self.command: Any = None

    def _setcallback(self, callback: Any, **_: Any) -> None:
        self.command = callback

    def sendevent(self, name: str, **payload: Any) -> None:
        if name == "runtest_protocol_complete":
            self.complete.append(payload["item_index"])
        else:
            self.said.append(payload["indices"])
            self._answer(*payload["indices"])


class Run:
    """A worker with six tests; what was run is in `ran`, with the next test that each one knew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, looks_ahead: bool = False) -> None:
        self.answers: dict[tuple[Any, ...], Callable[[], None]] = {}
        self.ran: list[tuple[Item, Item | None]] = []
        self.items = [Item(number) for number in range(6)]
        self.session: Any = SimpleNamespace(
            items=self.items, shouldstop=False, shouldfail=False, config=None
        )
        for item in self.items:
            item.session = self.session
        self.xdist = WorkerInteractor(self._answer)
        manager = SimpleNamespace(
            get_plugins=lambda: [self.xdist],
            has_plugin=lambda *_: False,
            register=lambda *_: None,
        )
        self.config: Any = SimpleNamespace(pluginmanager=manager)
        self.session.config = self.config
        self.link = Link(lambda *_: None)
        self.loop = RunLoop(self.config, SETTINGS, self.link)

        def run_protocol(item: Any, nextitem: Any) -> None:
            if not self.loop.pytest_runtest_protocol(item):
                self.ran.append((item, nextitem))

        self.config.hook = SimpleNamespace(pytest_runtest_protocol=run_protocol)
        monkeypatch.setattr(
            pytest_items, "run_phases", lambda item, ask: self.ran.append((item, ask()))
        )
        monkeypatch.setattr(
            pytest_items, "who_wants_the_next_test", lambda *_: lambda _: looks_ahead
        )
        monkeypatch.setattr(runner, "_empty_caches", lambda: [7])

    def _answer(self, *words: Any) -> None:
        key = tuple(str(word) if isinstance(word, list) else word for word in words)
        self.answers.get(key, lambda: None)()

    def send(self, kind: str, payload: Any = None) -> None:
        self.link.receive((kind, payload))

    def send_tests(
        self, *tests: int, admitted: bool = True, ahead: int = 0, needs: Any = (), **refusals: Any
    ) -> None:
        self.send(
            "run",
            {
                "tests": list(tests), "needs": squeezed(needs or [None] * len(tests)),
                "admitted": admitted, "ahead": ahead,
                "refusals": {int(test[1:]): refusal for test, refusal in refusals.items()},
            },
        )  # fmt: skip

    def shutdown(self) -> None:
        self.xdist.command(("shutdown", {}))

    def start(self) -> bool | None:
        return self.loop.pytest_runtestloop(self.session)

    @property
    def numbers(self) -> list[tuple[int, int | None]]:
        return [(item.number, None if n is None else n.number) for item, n in self.ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_the_next_test_is_asked_for_at_the_end_of_the_call(run: Run) -> None:
    run.send("dispatch")
    run.send_tests(0, needs=[5])
    run.answers["asked", 0, "end"] = lambda: run.send_tests(3)
    run.answers["asked", 3, "end"] = run.shutdown
    assert run.start() is True
    assert run.numbers == [(0, 3), (3, None)]
    assert run.xdist.complete == [0, 3]
    assert run.xdist.said == [["asked", 0, "end"], ["asked", 3, "end"]]
    assert run.items[0].stash[NEED] == 5
    assert NEED not in run.items[3].stash


def test_without_dispatch_xdist_has_its_commands(run: Run) -> None:
    """Its own loop hears what came before it, and what comes later."""
    heard: list[Any] = []

    def connect() -> None:
        run.xdist.command(("runtests", {"indices": [0]}))

    run.xdist.channel.setcallback = lambda callback, **_: (
        setattr(run.xdist, "command", callback), connect()
    )  # fmt: skip
    assert run.start() is None
    run.xdist.channel.setcallback(heard.append, endmarker="end")
    run.shutdown()
    assert heard == [("runtests", {"indices": [0]}), ("shutdown", {})]


def test_what_was_sent_runs_before_a_shutdown(run: Run) -> None:
    run.send("dispatch")
    run.send_tests(1, 2)
    run.answers["asked", 2, "end"] = run.shutdown
    run.start()
    assert run.numbers == [(1, 2), (2, None)]


def test_a_bound_test_waits_between_two_protocols(run: Run) -> None:
    """The one before it knows it; it starts when it is admitted, and not before."""
    run.send("dispatch")
    run.send_tests(0)
    run.answers["asked", 0, "end"] = lambda: run.send_tests(1, admitted=False)
    events: list[str] = []

    def admit() -> None:
        events.append("admitted")
        run.send("admit", {"test": 1, "need": 9, "refusal": None})

    complete = run.xdist.complete

    class Complete(list[int]):
        def append(self, index: int) -> None:
            super().append(index)
            events.append(f"complete {index}")
            if index == 0:
                admit()

    run.xdist.complete = Complete(complete)
    run.answers["asked", 1, "end"] = run.shutdown
    run.start()
    assert run.numbers == [(0, 1), (1, None)]
    assert events == ["complete 0", "admitted", "complete 1"]
    assert run.items[1].stash[NEED] == 9


def test_a_parked_worker_goes_on(run: Run) -> None:
    run.send("dispatch")
    run.send_tests(0)

    def park() -> None:
        run.send("park")
        run.send_tests(4)

    run.answers["asked", 0, "end"] = park
    run.answers["asked", 4, "end"] = run.shutdown
    run.start()
    assert run.numbers == [(0, None), (4, None)]


def test_the_same_test_again(run: Run) -> None:
    """Another plugin may have a test run once more, in the same worker."""
    run.send("dispatch")
    run.send_tests(0)
    times = iter([lambda: run.send_tests(0), run.shutdown])
    run.answers["asked", 0, "end"] = lambda: next(times)()
    run.start()
    assert run.numbers == [(0, 0), (0, None)]


def test_short_tests_are_asked_for_ahead(run: Run) -> None:
    """With two of four left, once; the answer follows them."""
    run.send("dispatch")
    run.send_tests(0, 1, 2, 3, ahead=2)
    run.answers["asked", 3, "start"] = lambda: run.send_tests(4)
    run.answers["asked", 4, "end"] = run.shutdown
    run.start()
    assert run.numbers == [(0, 1), (1, 2), (2, 3), (3, 4), (4, None)]
    assert run.xdist.said == [["asked", 3, "start"], ["asked", 4, "end"]]


def test_others_that_want_the_next_test_get_it_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, looks_ahead=True)
    run.send("dispatch")
    run.send_tests(0)
    run.answers["asked", 0, "start"] = lambda: run.send_tests(5)
    run.answers["asked", 5, "start"] = run.shutdown
    run.start()
    assert run.numbers == [(0, 5), (5, None)]


def test_tests_are_given_back(run: Run) -> None:
    """All but the next one, which the running one may know; before any other question."""
    run.send("dispatch")
    run.send_tests(0, 1, 2, 3)
    run.loop._take = lambda payload: (  # type: ignore[method-assign]
        RunLoop._take(run.loop, payload), run.send("recall")
    )  # fmt: skip
    run.answers["asked", 0, "end"] = run.shutdown
    run.start()
    assert run.xdist.said[0] == ["returned", [1, 2, 3]]
    assert run.numbers == [(0, None)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_bound_test_that_is_withdrawn(
    fails: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept for it is torn down; only an error is reported, as the last test's."""

    def tear_down(session: object) -> None:
        if fails:
            raise RuntimeError("the module fails")

    monkeypatch.setattr(pytest_items, "tear_down_all", tear_down)
    run.send("dispatch")
    run.send_tests(0)
    run.answers["asked", 0, "end"] = lambda: (
        run.send_tests(1, admitted=False), run.send("empty", True)
    )  # fmt: skip
    run.answers["emptied", "[7]"] = run.shutdown
    run.start()
    assert run.numbers == [(0, 1)]
    assert [(r.when, r.outcome, r.longrepr) for r in run.items[0].reports] == (
        [("teardown", "failed", "the module fails")] if fails else []
    )


def test_refused(run: Run) -> None:
    run.send("dispatch")
    run.send_tests(2, t2=["fail", "too large"])
    run.answers["asked", 2, "end"] = run.shutdown
    run.start()
    assert run.items[2].stash[REFUSAL] == ("fail", "too large")


def test_the_controller_is_gone(run: Run) -> None:
    """Even a bound test does not keep the worker."""
    run.send("dispatch")
    run.send_tests(0)
    run.answers["asked", 0, "end"] = lambda: (
        run.send_tests(1, admitted=False), run.send("closed")
    )  # fmt: skip
    run.start()
    assert run.numbers == [(0, 1)]


def test_a_run_that_stops(run: Run) -> None:
    """A test that asks the session to stop is the last one, whatever was sent."""
    run.send("dispatch")
    run.send_tests(0, 1)
    run.xdist.complete = Stops(run)
    run.start()
    assert run.numbers == [(0, 1)]


class Stops(list[int]):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def append(self, index: int) -> None:
        super().append(index)
        self._run.session.shouldstop = "enough"


def test_what_is_done_before_it_waits(run: Run) -> None:
    """With nothing to run, and not where something has come already."""
    comes = [lambda: run.send("dispatch"), lambda: run.send_tests(0)]
    waits: list[int] = []

    def prepare() -> None:
        waits.append(len(run.ran))
        comes[len(waits) - 1]()

    run.loop.when_idle = prepare
    run.answers["asked", 0, "end"] = run.shutdown
    run.start()
    assert waits == [0, 0]
    assert run.numbers == [(0, None)]
