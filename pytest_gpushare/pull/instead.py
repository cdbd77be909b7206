"""Reports of tests that are not run: refused, or without the GPU that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest


def report_instead(item: pytest.Item, outcome: str, reason: str) -> None:
    """Report the test at its place, by name, without its fixtures and without its body.

    Made by hand, since no `xfail` and no rerun must turn a refusal into something else.
    """
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, outcome, reason):
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


def _reports(item: pytest.Item, outcome: str, reason: str) -> Iterator[pytest.TestReport]:
    if outcome == "skip":
        path, line, _ = item.reportinfo()
        where = (str(path), 0 if line is None else line + 1, f"Skipped: {reason}")
        yield _report(item, "setup", "skipped", where)
    else:
        yield _report(item, "setup", "passed")
        yield _report(item, "call", "failed", reason)
    yield _report(item, "teardown", "passed")


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
