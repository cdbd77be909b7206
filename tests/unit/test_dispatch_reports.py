"""A test's last report is held back until what is wider than the test is torn down too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pytest_gpushare.dispatch.reports import HeldBack, HeldBackReports
from pytest_gpushare.wire import MORE


def report(nodeid: str, *, more: bool = True, **values: Any) -> SimpleNamespace:
    """A report as far as it matters."""
    made = SimpleNamespace(nodeid=nodeid, duration=1.0, sections=[], **values)
    if more:
        setattr(made, MORE, True)
    return made


def event(what: SimpleNamespace) -> tuple[str, dict[str, Any]]:
    """xdist's event of a report."""
    return "testreport", {"node": "node", "rep": what}


def test_released_when_the_worker_goes_on() -> None:
    """Not by what is said of the same test, but by the next one, or by the worker's end."""
    for after in ("logstart", "workerfinished"):
        out: list[Any] = []
        back = HeldBack(out.append)
        held = event(report("a", item_index=3))
        back(held)
        beside = ["runtest_protocol_complete", "unscheduled", "warning_recorded"]
        for name in ("logfinish", *beside):
            back((name, {}))
        assert [name for name, _ in out] == beside
        back((after, {}))
        assert out[3:] == [held, ("logfinish", {}), (after, {})]
        assert not hasattr(held[1]["rep"], MORE)


def test_the_report_of_both_takes_its_place() -> None:
    """Under the index of the test, though the worker was at its rest item."""
    out: list[Any] = []
    back = HeldBack(out.append)
    back(event(report("a", item_index=3)))
    back(event(whole := report("a", item_index=9)))
    assert out == []
    back(("logstart", {}))
    assert [told["rep"] for name, told in out if name == "testreport"] == [whole]
    assert whole.item_index == 3


def test_other_reports_pass() -> None:
    """Where nothing may follow, and after another test's that was held back."""
    out: list[Any] = []
    back = HeldBack(out.append)
    back(first := event(report("a", more=False)))
    back(second := event(report("b")))
    back(third := event(report("c")))
    assert out == [first, second]
    back.release()
    back.release()
    assert out == [first, second, third]


def test_amended() -> None:
    """What a wider teardown wrote stands beside what the test's own wrote; times add up."""
    sections = [("Captured stdout call", "x"), ("Captured stdout teardown", "y")]
    logged: list[SimpleNamespace] = []
    reports = HeldBackReports(lambda report: logged.append(report))
    node = SimpleNamespace(gateway=SimpleNamespace(id="gw0"), putevent=lambda _: None)
    reports.join(node)
    held = report("a")
    held.sections = sections
    node.putevent(event(held))
    reports.amend("gw0", ["b", 5.0, []])
    reports.amend("gw1", ["a", 5.0, []])
    reports.amend("gw0", ["a", 0.5, [("Captured stdout teardown", "yz")]])
    assert (held.duration, held.sections) == (
        1.5,
        [("Captured stdout call", "x"), ("Captured stdout teardown", "yz")],
    )
    # After Ctrl-C nobody takes it from the queue.
    reports.pytest_sessionfinish()
    assert logged == [held]
    assert held.node == "node"
    reports.pytest_sessionfinish()
    assert logged == [held]


def test_a_worker_that_dies() -> None:
    """In the wider teardown: then its test has crashed. Else what was held back is reported."""
    for died_in, expected in (("a", []), ("b", ["a"]), (None, ["a"])):
        logged: list[str] = []
        out: list[Any] = []
        reports = HeldBackReports(lambda report, logged=logged: logged.append(report.nodeid))
        node = SimpleNamespace(gateway=SimpleNamespace(id="gw0"), putevent=out.append)
        reports.join(node)
        node.putevent(event(report("a")))
        node.putevent(("errordown", {}))
        assert out == [("errordown", {})]
        assert (reports.of("gw0"), reports.of("gw1")) == ("a", None)
        reports.settle("gw0", died_in=died_in)
        reports.settle("gw0", died_in=died_in)
        reports.pytest_sessionfinish()
        assert logged == expected


def test_an_xdist_that_has_no_queue_there() -> None:
    """Reports are as they come."""
    HeldBackReports(print).join(SimpleNamespace(gateway=SimpleNamespace(id="gw0")))
