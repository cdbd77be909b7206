"""pytest's items: their phases, their fixtures, and what one attempt of a test left behind.

A test is run with a question between its call and its teardown. One that is run once more ends
its first attempt so that the second can follow within the same protocol.

pytest has no public way to do either. Private names that are used, most of them as
pytest-rerunfailures has used them for years:

- `_pytest.runner.call_and_report` (since pytest 2): makes, logs and reports one phase as pytest
  itself does; `_pytest.runner.show_test_item` (since 3.0): what `--setup-show` prints. Without one
  of them, or where the first takes other arguments, `run_phases` is None, and pytest's own protocol
  runs each test.

- `Session._setupstate` (since 2.4) with `teardown_exact` and `stack`: what is set up. Without it
  the test is not run again.
- `item._request`, `item._initrequest` (since 2.3): a new request for fixtures. Without them the old
  one is used.
- `item._instance`, `item._obj` (since 8.2 and 2.3): the instance of the test's class. Without them
  the second attempt sees the first one's.
- `item._excinfo` (since 2.0): the errors of a unittest test. Without it such a test that runs out
  of memory is not recognised.
- `item._fixtureinfo` with `name2fixturedefs`, `FixtureDef.cached_result` (since 2.3): the fixtures
  of a test. Without them tests that share fixtures of a class or module are not kept together,
  such a fixture that ran out of memory keeps its error, and the traceback of a failed one lacks
  the values of variables from the second test on.
- `item.callspec.params` (since 2.5): the values of its parameters. Without it no parameter names
  the model that a test uses.
- `pytest_rerunfailures.get_reruns_count` (since 2.2): None for a test that it leaves to pytest.
  Without it the next test is asked for at the start of each one.
- `item.callspec._arg2scope` (since 3.0): the scopes of its parameters. Without it the values of a
  parametrised fixture of a class or module may be set up more often.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def end_function(item: pytest.Item) -> None:
    """Tear down what belongs to the test function alone; raises what the teardown raises.

    Fixtures of its class, module and session live on, but for those that failed. No hook is
    called: where this raises, the test's own teardown is still to come.
    """
    state = _setup_state(item.session)
    if state is None:
        raise RuntimeError("this pytest does not show what is set up")
    state.teardown_exact(_lowest_sound_parent(item))
    for definition, _ in _failed_fixtures(item):
        # Finished as at the end of its scope, and not only emptied: pytest 9.1 and newer insist on
        # that before the next set-up.
        definition.finish(getattr(item, "_request", None))
    excinfos(item).clear()


def renew(item: pytest.Item) -> None:
    """Give the test a new request for fixtures, and an instance of its class: both are used."""
    if isinstance(item.parent, pytest.Class):
        # pytest keeps one for each test; what the first attempt left on `self` must not count.
        vars(item).pop("_instance", None)
        vars(item)["_obj"] = None
    make_request = getattr(item, "_initrequest", None)
    if make_request is not None:
        make_request()


def excinfos(item: pytest.Item) -> list[Any]:
    """Where a unittest test keeps its errors, which it does not raise; else an empty list."""
    found = getattr(item, "_excinfo", None)
    return found if isinstance(found, list) else []


def error_of_unittest(item: pytest.Item) -> BaseException | None:
    """What a unittest test failed with, if it did; pytest asks for it when it reports."""
    found = excinfos(item)
    value = getattr(found[0], "value", None) if found else None
    return value if isinstance(value, BaseException) else None


def kept_errors(item: pytest.Item) -> list[BaseException]:
    """Errors that pytest keeps and raises again for the next tests of a class or module.

    Those of fixtures and collectors whose set-up failed, as far as the private names show them.
    """
    stack = getattr(_setup_state(item.session), "stack", {})
    found = [entry[1] for entry in stack.values() if len(entry) > 1]
    found += [failure for _, failure in _failed_fixtures(item)]
    # Since pytest 8.1 with the traceback.
    errors = [each[0] if isinstance(each, tuple) and each else each for each in found]
    return [error for error in errors if isinstance(error, BaseException)]


def tear_down_all(session: pytest.Session) -> None:
    """Tear down what is set up still; raises what that raises. Without pytest's stack: nothing."""
    state = _setup_state(session)
    if state is not None:
        state.teardown_exact(None)


def _setup_state(session: pytest.Session) -> Any:
    return getattr(session, "_setupstate", None)


def _lowest_sound_parent(item: pytest.Item) -> Any:
    """The collector nearest to the test whose own set-up has not failed.

    One whose set-up failed (`setup_module`) keeps its error for all its tests: it must be torn
    down too, to be set up again.
    """
    stack = getattr(_setup_state(item.session), "stack", {})
    for node in item.listchain()[:-1]:
        _, failure = stack.get(node, (None, None))
        if failure is not None:
            return node.parent
    return item.parent


def _failed_fixtures(item: pytest.Item) -> Iterator[tuple[Any, Any]]:
    """The definitions of the test's fixtures whose set-up failed, with what pytest keeps of that
    to raise it again."""
    info = getattr(item, "_fixtureinfo", None)
    for definitions in getattr(info, "name2fixturedefs", {}).values():
        for definition in definitions:
            result = getattr(definition, "cached_result", None)
            if result is not None and result[2] is not None:
                yield definition, result[2]


def fixtures_of(item: pytest.Item) -> Any:
    """What knows the fixtures of a test, the same object for all of one function; None: unknown."""
    info = getattr(item, "_fixtureinfo", None)
    return info if hasattr(info, "name2fixturedefs") else None


def fixture_scopes(fixtures: Any) -> set[str]:
    """The scopes of the fixtures of a test, as `fixtures_of` gives them."""
    return {str(found[-1].scope) for found in fixtures.name2fixturedefs.values() if found}


def parameter_of(item: pytest.Item, name: str) -> object:
    """The value of a parameter of a test; None where it has none of that name."""
    params = getattr(getattr(item, "callspec", None), "params", None)
    return params.get(name) if isinstance(params, dict) else None


def parameter_scopes(item: pytest.Item) -> set[str]:
    """The scopes for which the parameters of a test have one value."""
    scopes = getattr(getattr(item, "callspec", None), "_arg2scope", {})
    return {str(scope.value) for scope in scopes.values()}


def _setup_shown(item: pytest.Item, runner: Any) -> bool:
    """Print the test for `--setup-show`. Returns whether its call is to be left out."""
    setup_only = bool(item.config.getoption("setuponly", False))
    if item.config.getoption("setupshow", False):
        # pytest 8.4 and newer leave a space only before an outcome.
        takes_space = "add_space" in inspect.signature(runner.show_test_item).parameters
        runner.show_test_item(item, **({"add_space": not setup_only} if takes_space else {}))
    return setup_only


def protocol_of(
    runner: Any,
) -> Callable[[pytest.Item, Callable[[], pytest.Item | None]], None] | None:
    """The phases of a test, made of the given `_pytest.runner`; None where it lacks something.

    The result takes the test and what names the next one, which is called once the call is over.
    """
    needed = ("call_and_report", "show_test_item", "runtestprotocol")
    if not all(callable(getattr(runner, name, None)) for name in needed):
        return None
    try:
        inspect.signature(runner.call_and_report).bind(None, "teardown", nextitem=None)
    except TypeError:
        return None
    # From pytest 8.2 on a run that stops tears everything down with its last test.
    tears_all_down = "shouldfail" in runner.runtestprotocol.__code__.co_names

    def run_phases(item: Any, ask: Callable[[], pytest.Item | None]) -> None:
        has_request = hasattr(item, "_request")
        if has_request and not item._request:
            item._initrequest()
        try:
            if runner.call_and_report(item, "setup").passed and not _setup_shown(item, runner):
                runner.call_and_report(item, "call")
            session = item.session
            stops = tears_all_down and (session.shouldfail or session.shouldstop)
            runner.call_and_report(item, "teardown", nextitem=None if stops else ask())
        finally:
            if has_request:
                item._request = False
                item.funcargs = None

    return run_phases


def _runner() -> Any:
    try:
        from _pytest import runner
    except ImportError:
        return None
    return runner


run_phases = protocol_of(_runner())


def who_wants_the_next_test(config: pytest.Config, own: object) -> Callable[[pytest.Item], bool]:
    """Find which tests a plugin or conftest file runs by itself, or sees with the next one.

    A wrapper that does not name `nextitem` does neither.
    """
    runner = _runner()
    counts: list[Callable[[pytest.Item], Any]] = []
    for found in config.hook.pytest_runtest_protocol.get_hookimpls():
        is_wrapper = found.hookwrapper or getattr(found, "wrapper", False)
        if found.plugin in (own, runner) or (is_wrapper and "nextitem" not in found.argnames):
            continue
        count = getattr(found.plugin, "get_reruns_count", None)
        if not callable(count):
            return lambda _: True
        counts.append(count)
    return lambda item: any(count(item) is not None for count in counts)
