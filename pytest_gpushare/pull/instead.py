"""Reports of tests that are not run: refused, or without the GPU that they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest


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
