"""What the controller of an active run sees of workers and tests, handed on to the house."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gpushare.run.journal import Told
from pytest_gpushare.run.places import NUMBER
from pytest_gpushare.run.record import Event
from pytest_gpushare.run.started import LeftAlone, Started
from pytest_gpushare.worker import ITSELF


class Observer:
    """Hooks that are registered only where a plan was made."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._began = started.record.began_at
        self._passed = started.journal.passed
        self._marker = getattr(started.settings, "marker", "gpu")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to start."""
        number = node.gateway.spec.env.get(NUMBER, "")
        self._started.crew.join(
            node.gateway.id, int(number) if number.isdigit() else None, self._started.record.now()
        )

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has finished, or died."""
        crashed = error is not None and not hasattr(node, "workeroutput")
        started = self._started
        started.crew.leave(node.gateway.id, started.record.now(), crashed=crashed)
        if crashed:
            started.record.note(
                "worker-crashed", f"{node.gateway.id} crashed", worker=node.gateway.id
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test has ended."""
        node = getattr(report, "node", None)
        worker = ITSELF if node is None else node.gateway.id
        start, end = report.start - self._began, report.stop - self._began
        marked = self._marker in report.keywords
        expected_to_fail = hasattr(report, "wasxfail")
        if (
            report.outcome == "passed"
            and not expected_to_fail
            and self._passed(worker, report.nodeid, report.when, start, end, marked)
        ):
            return
        self._started.journal.told(
            worker,
            Told(
                report.nodeid,
                str(report.when),
                report.outcome,
                expected_to_fail,
                start,
                end,
                marked,
            ),
        )


def observe(
    started: Started | LeftAlone, config: pytest.Config, listener: Callable[[Event], object]
) -> None:
    """Follow the tests of a run that has a plan; its own process is a worker where it has none.

    `listener` is called with each event at once.
    """
    if isinstance(started, LeftAlone):
        return
    config.pluginmanager.register(Observer(started), "gpu-share-observer")
    started.record.listen(listener)
    if started.plan.request.in_process:
        started.crew.join(ITSELF, None if started.unplaced else 0, started.record.now())
        started.crew.came_up(ITSELF, os.getpid())
