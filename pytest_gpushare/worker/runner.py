"""The plugin of a worker whose tests the controller hands out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, Protocol

import pytest

from pytest_gpushare.scheduler.needs import Need, written
from pytest_gpushare.units import format_gb, plural
from pytest_gpushare.wire import MORE
from pytest_gpushare.worker.collection import Reader, told_of
from pytest_gpushare.worker.teardown import Between, Rest


def report_instead(
    item: pytest.Item,
    outcome: str,
    reason: str,
    tear_down: Callable[[], pytest.CallInfo[None] | None],
) -> None:
    """Report the test at its place, by name, without its fixtures and without its body.

    Made by hand, since no `xfail` and no rerun must turn a refusal into something else.
    `tear_down` ends what earlier tests have set up and the next one does not share.
    """
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, outcome, reason):
        hook.pytest_runtest_logreport(report=report)
    call = tear_down()
    if call is None or call.excinfo is None:
        report = _report(item, "teardown", "passed")
    else:
        report = hook.pytest_runtest_makereport(item=item, call=call)
    hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def report_lost(config: pytest.Config, nodeid: str, reason: str) -> None:
    """Report, in the controller, a test that no worker can run any more."""
    path = nodeid.partition("::")[0]
    report = pytest.TestReport(
        nodeid=nodeid,
        location=(path, None, path),
        keywords={},
        outcome="failed",
        longrepr=reason,
        when="call",
    )
    config.hook.pytest_runtest_logreport(report=report)


def _reports(item: pytest.Item, outcome: str, reason: str) -> list[pytest.TestReport]:
    if outcome == "skip":
        path, line, _ = item.reportinfo()
        where = (str(path), 0 if line is None else line + 1, f"Skipped: {reason}")
        return [_report(item, "setup", "skipped", where)]
    return [_report(item, "setup", "passed"), _report(item, "call", "failed", reason)]


def _report(
    item: pytest.Item,
    when: Literal["setup", "call", "teardown"],
    outcome: Literal["passed", "failed", "skipped"],
    longrepr: Any = None,
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=outcome,
        longrepr=longrepr,
        when=when,
    )


class Unaided:
    """The plugin of a process that must see for itself which of its tests can run."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._reader = Reader(message)
        self._without: str = message["without_gpu"]
        self._absence: str = message["absence"]
        self._budget: int = message["budget"]
        self._devices: int = message["devices"]
        self._between: Between | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Report a test that is not run; leave the others to pytest."""
        between = self._between = self._between or Between(item.session)
        between.follow(item)
        outcome, reason = self._judged(item)
        if not outcome:
            return None
        reason = f"gpu-share: {reason}"
        report_instead(item, outcome, reason, lambda: between.tear_down(nextitem))
        return True

    def _judged(self, item: pytest.Item) -> tuple[str, str]:
        """`fail` or `skip` with the reason; two empty texts for a test that is to run."""
        said, want = self._reader.wanted(item)
        if said.refusal:
            return "fail", said.refusal
        if not want.marked:
            return "", ""
        if not self._absence:
            problem = self._problem(want.need or Need())
            return ("fail", problem) if problem else ("", "")
        if said.required:
            return "fail", f"it requires a GPU: {self._absence}"
        if self._without == "run":
            return "", ""
        return self._without, f"{self._absence} (gpu_share_without_gpu = {self._without})"

    def _problem(self, need: Need) -> str:
        if need.devices > self._devices:
            seen = plural(self._devices, "device")
            return (
                f"needs {plural(need.devices, 'device')}, and this process sees {seen}: see "
                "gpu_share_visible_devices, or leave it out with -m or -k"
            )
        if need.vram is not None and need.vram > self._budget:
            return (
                f"needs {format_gb(need.vram)} of VRAM (by {need.source}), and the budget is "
                f"{format_gb(self._budget)}: lower the need, or leave more to the tests"
            )
        return ""


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
    from pytest_gpushare.worker import counters

    # Other people's finalizers may do anything.
    with contextlib.suppress(Exception):
        counters.empty()
    figures = counters.measured(None, counters.counts())
    return None if figures is None else list(figures.helds)
