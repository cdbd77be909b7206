"""The plugin of a worker whose tests the controller hands out."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import pytest

from pytest_gpushare.pull.instead import report_instead
from pytest_gpushare.pull.items import Reader, told_of
from pytest_gpushare.pull.rest import Between, Rest
from pytest_gpushare.run.held_back import MORE
from pytest_gpushare.run.told import written


class Link(Protocol):
    """The private channel to the controller."""

    def send(self, kind: str, payload: Any) -> None:
        """Tell it something."""

    def on(self, kind: str, handler: Any) -> None:
        """Hear something."""


class Puller:
    """Tells what was collected, and obeys what comes beside xdist's own commands.

    The handlers of messages run in the thread that receives, and in the order in which the
    controller sent: what is said of a test is here before xdist's command to run it.
    """

    def __init__(self, message: Mapping[str, Any], link: Link) -> None:
        self._reader = Reader(message)
        self._link = link
        self._rest: Rest | None = None
        self._between: Between | None = None
        self._instead: dict[int, tuple[str, str]] = {}
        self._empty: bool | None = None
        self._rests = False
        """Whether the rest item comes behind the test that runs, or ran last."""
        self._resting = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tell what was collected before xdist does."""
        self._link.send("collected", written(told_of(session.items, self._reader)))
        items = session.items
        rest = Rest.from_parent(session, name="between two tests")

        def begin(_: Any) -> None:
            # Now the controller is sure to dispatch by itself: xdist never sees the rest item
            # in a run that is left to it.
            self._between = Between(session, lambda lacks: self._link.send("wider", lacks))
            self._rest = rest
            items.append(rest)

        self._link.on("pull", begin)
        self._link.on("instead", lambda told: self._note(items[told[0]], told[1], told[2]))
        self._link.on("empty", self._note_empty)

    def _note(self, item: pytest.Item, outcome: str, reason: str) -> None:
        self._instead[id(item)] = (outcome, reason)

    def _note_empty(self, fixtures: bool) -> None:
        self._empty = fixtures

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run what no one else must see: the rest item, and tests that are not run."""
        between, rest = self._between, self._rest
        if between is None or rest is None:
            return None
        if item is rest:
            self._take_a_rest(between, rest, nextitem)
            return True
        between.follow(item)
        self._rests = nextitem is rest
        if self._rests:
            rest.follow(item)
        instead = self._instead.pop(id(item), None)
        if instead is None:
            return None
        report_instead(
            item, *instead, lambda: None if nextitem is rest else between.tear_down(nextitem)
        )
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep how a test's own teardown went, behind which a wider one may follow."""
        report = yield
        if self._rests and call.when == "teardown" and not self._resting and self._between:
            self._between.ended(call, report)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Mark the report that the controller is to hold back until then."""
        if self._rests and report.when == "teardown":
            setattr(report, MORE, True)

    def _take_a_rest(self, between: Between, rest: Rest, nextitem: pytest.Item | None) -> None:
        self._resting = True
        try:
            self._tear_down(between, rest, nextitem)
        finally:
            self._resting = False

    def _tear_down(self, between: Between, rest: Rest, nextitem: pytest.Item | None) -> None:
        fixtures, self._empty = self._empty, None
        if fixtures is None:
            between.change_over(nextitem)
            return
        if fixtures:
            between.leave_all(rest)
        self._link.send("emptied", _empty_caches())


def _empty_caches() -> list[int] | None:
    """What the frameworks hold then, by visible device; None where nobody can tell."""
    from pytest_gpushare.run import caches, peaks

    # Other people's finalizers may do anything.
    with contextlib.suppress(Exception):
        caches.empty()
    figures = peaks.measured(None, peaks.counts())
    return None if figures is None else list(figures.helds)
