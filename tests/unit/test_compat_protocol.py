"""pytest's protocol with a question before the teardown, and what happens without its names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from _pytest import runner

from pytest_gpushare.compat.pytest_items import (
    end_function,
    error_of_unittest,
    excinfos,
    fixtures_of,
    parameter_scopes,
    protocol_of,
    renew,
    run_phases,
    tear_down_all,
    who_wants_the_next_test,
)


@pytest.mark.parametrize("name", ["call_and_report", "show_test_item", "runtestprotocol"])
def test_without_a_name_of_the_runner(name: str) -> None:
    """There is no protocol of ours then, and pytest's own runs the tests."""
    names = {
        n: getattr(runner, n) for n in ("call_and_report", "show_test_item", "runtestprotocol")
    }
    assert protocol_of(SimpleNamespace(**names)) is not None
    del names[name]
    assert protocol_of(SimpleNamespace(**names)) is None
    assert protocol_of(None) is None


def test_this_pytest_has_what_it_takes() -> None:
    assert run_phases is not None


class Session:
    shouldfail = shouldstop = False


def phases(*, fails: bool = False, session: Any = Session, **options: bool) -> list[Any]:
    """The phases that are run, with what the teardown was told; `ask` where it was asked."""
    done: list[Any] = []

    def call_and_report(item: Any, when: str, **more: Any) -> Any:
        done.append((when, more["nextitem"]) if more else when)
        return SimpleNamespace(passed=not fails)

    def runtestprotocol(item: Any) -> bool:
        return item.session.shouldfail  # type: ignore[no-any-return]

    def show_test_item(item: Any, add_space: bool) -> None:
        done.append("shown")

    made = protocol_of(
        SimpleNamespace(
            call_and_report=call_and_report,
            show_test_item=show_test_item,
            runtestprotocol=runtestprotocol,
        )
    )
    assert made is not None
    item: Any = SimpleNamespace(
        session=session(),
        config=SimpleNamespace(getoption=lambda name, default: options.get(name, default)),
        funcargs={},
        _request=False,
        _initrequest=lambda: done.append("request"),
    )

    def ask() -> Any:
        done.append("ask")
        return "next"

    made(item, ask)
    assert item.funcargs is None
    return done


def test_the_question_comes_between_call_and_teardown() -> None:
    assert phases() == ["request", "setup", "call", "ask", ("teardown", "next")]
    assert phases(fails=True) == ["request", "setup", "ask", ("teardown", "next")]
    shown = ["request", "setup", "shown", "ask", ("teardown", "next")]
    assert phases(setuponly=True, setupshow=True) == shown


def test_a_run_that_stops_asks_for_nothing() -> None:
    """As pytest 8.2 and newer, which tear everything down then."""
    stopped = type("Stopped", (Session,), {"shouldfail": "one failure"})
    assert phases(session=stopped) == ["request", "setup", "call", ("teardown", None)]


def config_with(*plugins: object) -> Any:
    manager = pytest.PytestPluginManager()
    for plugin in plugins:
        manager.register(plugin)
    return SimpleNamespace(hook=manager.hook)


def plugin_of(hook: Any) -> Any:
    return type("Plugin", (), {"pytest_runtest_protocol": staticmethod(hook)})()


def plain(item: pytest.Item) -> None: ...


@pytest.hookimpl(wrapper=True)
def wraps(item: pytest.Item) -> Any:
    return (yield)


@pytest.hookimpl(hookwrapper=True)
def wraps_as_ever(item: pytest.Item) -> Any:
    yield


@pytest.hookimpl(wrapper=True)
def sees(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    return (yield)


def sees_alone(item: pytest.Item, nextitem: pytest.Item | None) -> None: ...


@pytest.mark.parametrize(
    ("hook", "wants"), [(plain, True), (wraps, False), (wraps_as_ever, False), (sees, True)]
)
def test_whether_others_want_the_next_test(hook: Any, wants: bool) -> None:
    """A protocol of their own does, and a wrapper that names `nextitem`."""
    own = plugin_of(plain)
    item: Any = None
    assert who_wants_the_next_test(config_with(runner, own, plugin_of(hook)), own)(item) is wants


def test_who_wants_the_next_test_beside_rerunfailures() -> None:
    """It runs those tests alone that may be run again; without the function, each one."""
    own, reruns = plugin_of(plain), plugin_of(sees_alone)
    type(reruns).get_reruns_count = staticmethod(lambda item: item)
    wants = who_wants_the_next_test(config_with(runner, own, reruns), own)
    counts: Any = [None, 0, 2]
    assert [wants(count) for count in counts] == [False, True, True]
    del type(reruns).get_reruns_count
    assert who_wants_the_next_test(config_with(runner, own, reruns), own)(counts[0])


def test_without_the_stack_of_what_is_set_up() -> None:
    """Nothing can be torn down, and no test is run again."""
    session: Any = SimpleNamespace()
    tear_down_all(session)
    item: Any = SimpleNamespace(session=session)
    with pytest.raises(RuntimeError, match="does not show what is set up"):
        end_function(item)


def test_without_the_names_of_an_item() -> None:
    """Its fixtures and errors are unknown then, and the old request for fixtures is used."""
    item: Any = SimpleNamespace(parent=None)
    assert fixtures_of(item) is None
    assert parameter_scopes(item) == set()
    assert excinfos(item) == []
    assert error_of_unittest(item) is None
    renew(item)
