"""Private names that another version of pytest or xdist may lack, and what happens without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from _pytest import runner

from pytest_gpushare.compat.pytest_items import end_function, kept_errors, protocol_of, renew
from pytest_gpushare.compat.xdist_events import interactor_of


def _report_old(item: Any, when: str, log: bool = True) -> Any: ...


def _report_renamed(item: Any, when: str, log: bool = True, *, following: Any = None) -> Any: ...


def _report_more(item: Any, when: str, log: bool, plan: Any, **more: Any) -> Any: ...


def _report_as_now(item: Any, when: str, log: bool = True, **more: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "fits"),
    [(_report_old, 0), (_report_renamed, 0), (_report_more, 0), (_report_as_now, 1)],
)
def test_call_and_report_of_another_signature(function: Any, fits: int) -> None:
    """Where it does not take what we pass, there is no protocol of ours, and pytest's own runs."""
    names = SimpleNamespace(
        call_and_report=function,
        show_test_item=runner.show_test_item,
        runtestprotocol=runner.runtestprotocol,
    )
    assert (protocol_of(names) is not None) is bool(fits)


class WorkerInteractor:
    """xdist's object in a worker, as far as it is used."""

    def __init__(self) -> None:
        self.channel = SimpleNamespace(setcallback=print)

    def sendevent(self, name: str, **payload: Any) -> None: ...

    def pytest_runtest_logreport(self, report: Any) -> None:
        report.item_index = self.item_index  # type: ignore[attr-defined]


class Renamed:
    """The same where reports name the test otherwise."""

    channel = SimpleNamespace(setcallback=print)
    sendevent = print

    def pytest_runtest_logreport(self, report: Any) -> None:
        report.index = self.index  # type: ignore[attr-defined]


Renamed.__name__ = "WorkerInteractor"


@pytest.mark.parametrize(("plugin", "fits"), [(WorkerInteractor(), True), (Renamed(), False)])
def test_reports_that_belong_to_a_test_by_another_name(plugin: Any, fits: bool) -> None:
    """Where xdist does not look at `item_index`, its own loop runs the tests."""
    config: Any = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugins=lambda: [plugin]))
    assert (interactor_of(config) is not None) is fits


class State:
    """What is set up, as pytest keeps it."""

    def __init__(self) -> None:
        self.stack: dict[Any, Any] = {}
        self.torn_down: list[Any] = []

    def teardown_exact(self, nextitem: Any) -> None:
        self.torn_down.append(nextitem)


class Definition:
    """A fixture."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)
        self.finished = 0

    def finish(self, _: Any) -> None:
        self.finished += 1


def item_with(definition: Definition) -> Any:
    return SimpleNamespace(
        session=SimpleNamespace(_setupstate=State()),
        listchain=lambda: [None],
        parent="the module",
        _fixtureinfo=SimpleNamespace(name2fixturedefs={"wide": [definition]}),
    )


def test_without_the_result_of_a_fixture() -> None:
    """A fixture that failed keeps its error; the test is torn down all the same."""
    error = ValueError("no VRAM")
    known, unknown = Definition(cached_result=(None, None, (error, None))), Definition()
    assert kept_errors(item_with(known)) == [error]
    assert kept_errors(item_with(unknown)) == []
    for definition in (known, unknown):
        item = item_with(definition)
        end_function(item)
        assert item.session._setupstate.torn_down == ["the module"]
    assert (known.finished, unknown.finished) == (1, 0)


@pytest.mark.parametrize("names", [{"_instance": 1, "_obj": 2}, {"_obj": 2}, {}])
def test_without_the_instance_of_a_class(names: dict[str, int], request: Any) -> None:
    """What pytest keeps of an instance is forgotten where it is; the request is new in any case."""
    made: list[str] = []
    item: Any = SimpleNamespace(
        parent=pytest.Class.from_parent(request.node.parent, name="TestIt", obj=State),
        _initrequest=lambda: made.append("request"),
        **names,
    )
    renew(item)
    assert "_instance" not in vars(item)
    assert vars(item)["_obj"] is None
    assert made == ["request"]
