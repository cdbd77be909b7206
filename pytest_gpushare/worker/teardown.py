"""The teardown of what is wider than a test, told as the end of the test's own teardown.

In any run of pytest it is: a test whose next test is known tears its module down too. Here the
next test is known later, when the test's own teardown has been reported. Its report is held back
in the controller (`run/held_back.py`), and what comes here takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from pytest_gpushare.worker.counters import clear_frames

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

_TEAR_DOWN = ("runner", "capturemanager", "unraisableexception", "threadexception")
"""The plugins that a teardown needs; the hooks of all others were called for the last test."""

_LOGGING = "logging-plugin"

_SEVERAL = "errors during test teardown"
"""How pytest names the errors of several nodes, the widest first."""

_WORTH_TELLING = 0.001
"""Seconds; what takes less does not change a report."""


class Wider:
    """What is torn down after a test, and the report of both."""

    def __init__(self, config: pytest.Config) -> None:
        manager = config.pluginmanager
        self._records = _records_key()
        needed = _TEAR_DOWN if self._records is None else (*_TEAR_DOWN, _LOGGING)
        others = [
            plugin
            for name, plugin in manager.list_name_plugin()
            if plugin is not None and name not in needed
        ]
        self._hook = manager.subset_hook_caller("pytest_runtest_teardown", others)
        self._own: pytest.TestReport | None = None
        self._errors: list[BaseException] = []

    def follow(self, item: pytest.Item) -> None:
        """A test begins."""
        self._last = item
        self._own = None
        self._errors = []

    def ended(self, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
        """Its own teardown is over."""
        self._own = report
        self._errors = []
        if call.excinfo is not None:
            self._errors = [call.excinfo.value]

    def tear_down(self, nextitem: pytest.Item | None) -> pytest.CallInfo[None]:
        """Tear down what this next item does not share with the last one."""
        for error in self._errors:
            # It was reported with all that its frames hold, which is VRAM perhaps.
            clear_frames(error)
        item = self._last
        if self._records is not None:
            # pytest's logging forgets them at the end of a teardown, as there is but one.
            item.stash[self._records] = {}
        # No frame of ours is between pytest and the user's fixture, as in any traceback.
        call: pytest.CallInfo[None] = pytest.CallInfo.from_call(
            partial(self._hook, item=item, nextitem=nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        if call.excinfo is not None:
            error = call.excinfo.value
            before, self._errors = self._errors, [*_each(error), *self._errors]
            if before:
                all_errors = BaseExceptionGroup(_SEVERAL, self._errors)
                all_errors = all_errors.with_traceback(error.__traceback__)
                call.excinfo = pytest.ExceptionInfo.from_exception(all_errors)
        return call

    def report(self, call: pytest.CallInfo[None]) -> pytest.TestReport:
        """The report of the whole teardown, which failed."""
        item, own = self._last, self._own
        report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
        report.sections = _merged(report.sections)
        if own is not None:
            report.start = own.start
            report.duration += own.duration
            if own.failed and not hasattr(own, "wasxfail"):
                # One failure, which is counted now.
                item.session.testsfailed -= 1
        self._own = report
        return report

    def lacks(self, call: pytest.CallInfo[None]) -> tuple[str, float, list[tuple[str, str]]] | None:
        """Node id, seconds and output that the report of the own teardown does not have yet."""
        item = self._last
        found = pytest.TestReport.from_item_and_call(item, call).sections
        sections = [pair for pair in _merged(found) if pair[0].endswith(" teardown")]
        if call.duration < _WORTH_TELLING and not sections:
            return None
        return item.nodeid, call.duration, sections


def _records_key() -> Any:
    """Where pytest's logging keeps a test's records; None in a pytest that has it elsewhere."""
    try:
        from _pytest.logging import caplog_records_key
    except ImportError:
        return None
    return caplog_records_key


def _each(error: BaseException) -> Iterator[BaseException]:
    """The errors of each node that was torn down."""
    if isinstance(error, BaseExceptionGroup) and error.message == _SEVERAL:
        yield from error.exceptions
    else:
        yield error


def _merged(sections: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """One section of each title, where two teardowns have left one each."""
    found: dict[str, str] = {}
    for title, text in sections:
        if title in found:
            # Of a log the last line has no end.
            apart = "\n" if title.startswith("Captured log") else ""
            text = f"{found[title]}{apart}{text}"
        found[title] = text
    return list(found.items())


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
