"""A test's last report, held back until what is wider than the test is torn down too.

A worker that is sent one test at a time reports the teardown of a test before it knows the next
one, and so before it is known whether the module ends there. Were both reported, junit XML would
have the test twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_gpushare.wire import MORE

_BESIDE = frozenset(("runtest_protocol_complete", "unscheduled", "warning_recorded", "logwarning"))
"""xdist's events that say nothing of what the worker does next."""

Event = tuple[str, Mapping[str, Any]]


class HeldBack:
    """Stands between a worker and the queue of xdist's events."""

    def __init__(self, put: Callable[[Event], object]) -> None:
        """`put`: the queue."""
        self._put = put
        self._held: list[Event] = []
        """The report, and behind it the word that all of the test is told."""

    def __call__(self, event: Event) -> None:
        """An event of the worker; called in the thread in which it is heard, or in xdist's own."""
        name, told = event
        if name == "testreport" and told["rep"].__dict__.pop(MORE, False):
            self._hold(event, told["rep"])
        elif self._held and name == "logfinish":
            self._held.append(event)
        else:
            # Whether a worker that died did so in a wider teardown is decided by `settle`.
            if self._held and name not in _BESIDE and name != "errordown":
                self.release()
            self._put(event)

    def _hold(self, event: Event, report: Any) -> None:
        held = self._held[0][1]["rep"] if self._held else None
        if held is None or held.nodeid != report.nodeid:
            self.release()
            self._held = [event]
        else:
            # Reported with the rest item, it is the test's all the same.
            report.item_index = getattr(held, "item_index", None)
            self._held[0] = event

    def amend(self, nodeid: str, seconds: float, sections: Sequence[tuple[str, str]]) -> None:
        """The wider teardown went well: how long it took, and what it wrote."""
        report = self._held[0][1]["rep"] if self._held else None
        if report is not None and report.nodeid == nodeid:
            report.duration += seconds
            new = dict(sections)
            kept = [pair for pair in report.sections if pair[0] not in new]
            report.sections = [*kept, *new.items()]

    @property
    def nodeid(self) -> str | None:
        """The test whose report is held back."""
        return self._held[0][1]["rep"].nodeid if self._held else None

    def release(self) -> None:
        """Nothing follows any more."""
        held, self._held = self._held, []
        for event in held:
            self._put(event)

    def take(self) -> Any:
        """The report that is held back, with its worker, taken out; None where there is none."""
        held, self._held = self._held, []
        if not held:
            return None
        report = held[0][1]["rep"]
        report.node = held[0][1]["node"]
        return report


class HeldBackReports:
    """All workers' reports that are held back; a plugin of pytest while the own dispatch lasts."""

    def __init__(self, logreport: Callable[..., object]) -> None:
        """`logreport`: pytest's hook."""
        self._logreport = logreport
        self._workers: dict[str, HeldBack] = {}

    def join(self, node: Any) -> None:
        """A worker is about to be sent tests."""
        # An xdist that has it elsewhere: then reports are as they come.
        if hasattr(node, "putevent"):
            node.putevent = self._workers[node.gateway.id] = HeldBack(node.putevent)

    def amend(self, worker: str, told: Sequence[Any]) -> None:
        """A worker tells of a wider teardown that went well."""
        if worker in self._workers:
            self._workers[worker].amend(*told)

    def of(self, worker: str) -> str | None:
        """The test of this worker whose report is held back."""
        return self._workers[worker].nodeid if worker in self._workers else None

    def settle(self, worker: str, *, died_in: str | None) -> None:
        """A worker has died in this test: then that is reported, else what was held back."""
        back = self._workers.pop(worker, None)
        if back is not None and back.nodeid != died_in:
            self._report(back)

    def pytest_sessionfinish(self) -> None:
        """What nobody takes from the queue any more, after Ctrl-C, is reported all the same."""
        for back in self._workers.values():
            self._report(back)

    def _report(self, back: HeldBack) -> None:
        report = back.take()
        if report is not None:
            self._logreport(report=report)
