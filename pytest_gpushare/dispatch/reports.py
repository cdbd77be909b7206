"""Reports that the controller makes, of what no worker can report."""

from __future__ import annotations

import pytest


def report_lost(config: pytest.Config, nodeid: str, reason: str) -> None:
    """Report a test as failed that no worker can run any more."""
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


def report_difference(config: pytest.Config, worker: str, text: str) -> None:
    """Report an error of collection: this worker collected other tests than one of its kind."""
    report = pytest.CollectReport(nodeid=worker, outcome="failed", longrepr=text, result=[])
    config.hook.pytest_collectreport(report=report)
