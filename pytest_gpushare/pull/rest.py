"""The rest item: what a worker does between two tests that it is sent one at a time.

A worker of xdist starts a test only when it knows the next one. With the rest item behind it
a test starts at once, and nothing is committed: the next one is chosen when the worker is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pytest_gpushare.pull.wider import Wider


class Rest(pytest.Item):
    """Runs nothing; stands where the last test stood, so that its fixtures live on."""

    behind: pytest.Item | None = None
    """The test behind which this stands."""

    def follow(self, item: pytest.Item) -> None:
        """Stand behind a test: only its function is torn down, what is wider stays."""
        self.behind = item
        self.parent = item.parent
        self.own_markers = item.own_markers

    @property
    def nodeid(self) -> str:
        """That of the test: what is warned of or reported meanwhile belongs to it."""
        return super().nodeid if self.behind is None else self.behind.nodeid

    def runtest(self) -> None:
        """Nothing."""

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the test stands behind which this is."""
        return self.path, None, "between two tests"


class Between:
    """Tears down, between two tests, what the next one does not share with the last one."""

    def __init__(self, session: pytest.Session, amend: Callable[[Any], object] = bool) -> None:
        """`amend` tells what the last test's report lacks, where nothing failed."""
        self._session = session
        self._amend = amend
        self._wider = Wider(session.config)
        self._last: pytest.Item | None = None
        """The test that ran last; its class, module and session fixtures may still be set up."""

    def follow(self, item: pytest.Item) -> None:
        """This test runs now, or is reported without being run."""
        self._last = item
        self._wider.follow(item)

    def ended(self, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
        """Its own teardown is over: what is wider is told as part of it."""
        self._wider.ended(call, report)

    def change_over(self, nextitem: pytest.Item | None) -> None:
        """As the last test's own teardown would have done, had it known the next test."""
        self._leave(nextitem.listchain() if nextitem is not None else [], nextitem)

    def leave_all(self, rest: Rest) -> None:
        """Tear down all but what belongs to the session."""
        rest.parent = self._session
        self._leave(rest.listchain(), rest)

    def tear_down(self, nextitem: pytest.Item | None) -> pytest.CallInfo[None] | None:
        """Tear down at once what this next test does not share; None where it shares all."""
        chain = nextitem.listchain() if nextitem is not None else []
        return None if self._shares(chain) else self._wider.tear_down(nextitem)

    def _shares(self, chain: Sequence[Any]) -> bool:
        last = self._last
        kept = last.parent.listchain() if last is not None and last.parent is not None else []
        return list(chain[: len(kept)]) == kept

    def _leave(self, chain: Sequence[Any], nextitem: pytest.Item | None) -> None:
        """Tear down what is not in the chain of the next item; a failure is the last test's."""
        last = self._last
        if last is None or self._shares(chain):
            return
        call = self._wider.tear_down(nextitem)
        if call.excinfo is None:
            lacks = self._wider.lacks(call)
            if lacks is not None:
                self._amend(lacks)
            return
        report = self._wider.report(call)
        last.ihook.pytest_runtest_logreport(report=report)
        if not isinstance(call.excinfo.value, pytest.skip.Exception) and not hasattr(
            report, "wasxfail"
        ):
            last.ihook.pytest_exception_interact(node=last, call=call, report=report)
