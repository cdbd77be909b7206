"""The rest item: what a worker does between two tests that it is sent one at a time.

A worker of xdist starts a test only when it knows the next one. With the rest item behind it
a test starts at once, and nothing is committed: the next one is chosen when the worker is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

_TEAR_DOWN = ("runner", "capturemanager", "unraisableexception", "threadexception")
"""The plugins that a teardown needs; the hooks of all others were called for the last test."""


class Rest(pytest.Item):
    """Runs nothing; stands where the last test stood, so that its fixtures live on."""

    def follow(self, item: pytest.Item) -> None:
        """Stand behind a test: only its function is torn down, what is wider stays."""
        self.parent = item.parent
        self.own_markers = item.own_markers
        # What is warned of or reported meanwhile belongs to the test, as in any run.
        self._nodeid = item.nodeid

    def runtest(self) -> None:
        """Nothing."""

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the test stands behind which this is."""
        return self.path, None, "between two tests"


class Between:
    """Tears down, between two tests, what the next one does not share with the last one."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self.last: pytest.Item | None = None
        """The test that ran last; its class, module and session fixtures may still be set up."""
        manager = session.config.pluginmanager
        others = [
            plugin
            for name, plugin in manager.list_name_plugin()
            if plugin is not None and name not in _TEAR_DOWN
        ]
        self._tear_down = manager.subset_hook_caller("pytest_runtest_teardown", others)

    def change_over(self, nextitem: pytest.Item | None) -> None:
        """As the last test's own teardown would have done, had it known the next test."""
        self.leave(nextitem.listchain() if nextitem is not None else [], nextitem)

    def leave_all(self, rest: Rest) -> None:
        """Tear down all but what belongs to the session."""
        rest.parent = self._session
        self.leave(rest.listchain(), rest)

    def leave(self, chain: Sequence[Any], nextitem: pytest.Item | None) -> None:
        """Tear down what is not in the chain of the next item; a failure is the last test's."""
        last = self.last
        if last is None:
            return
        kept = last.parent.listchain() if last.parent is not None else []
        if list(chain[: len(kept)]) == kept:
            return
        call = pytest.CallInfo.from_call(
            lambda: self._tear_down(item=last, nextitem=nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        if call.excinfo is not None:
            hook = last.ihook
            report = hook.pytest_runtest_makereport(item=last, call=call)
            hook.pytest_runtest_logreport(report=report)
            if not isinstance(call.excinfo.value, pytest.skip.Exception):
                hook.pytest_exception_interact(node=last, call=call, report=report)
