"""What pytest's items do not say in public: their fixtures, and what one attempt left behind.

A test that is run once more ends its first attempt so that the second can follow within the same
protocol.

pytest has no public way to do that. Private names that are used, as pytest-rerunfailures has used
them for years:

- `Session._setupstate` (since 2.4) with `teardown_exact` and `stack`: what is set up. Without it
  the test is not run again.
- `item._initrequest` (since 2.3): a new request for fixtures. Without it the old one is used.
- `item._instance`, `item._obj` (since 8.2 and 2.3): the instance of the test's class. Without them
  the second attempt sees the first one's.
- `item._excinfo` (since 2.0): the errors of a unittest test. Without it such a test that runs out
  of memory is not recognised.
- `item._fixtureinfo` with `name2fixturedefs`, `FixtureDef.cached_result` (since 2.3): the fixtures
  of a test. Without them tests that share fixtures of a class or module are not kept together,
  such a fixture that ran out of memory keeps its error, and the traceback of a failed one lacks
  the values of variables from the second test on.
- `item.callspec._arg2scope` (since 3.0): the scopes of its parameters. Without it the values of a
  parametrised fixture of a class or module may be set up more often.
"""

from __future__ import annotations

from typing import Any

import pytest


def end_function(item: pytest.Item) -> None:
    """Tear down what belongs to the test function alone; raises what the teardown raises.

    Fixtures of its class, module and session live on, but for those that failed. No hook is
    called: where this raises, the test's own teardown is still to come.
    """
    state = _setup_state(item)
    if state is None:
        raise RuntimeError("this pytest does not show what is set up")
    state.teardown_exact(_lowest_sound_parent(item))
    _forget_failed_fixtures(item)
    if (found := excinfos(item)) is not None:
        found.clear()


def renew(item: pytest.Item) -> None:
    """Give the test a new request for fixtures, and an instance of its class: both are used."""
    if isinstance(item.parent, pytest.Class):
        # pytest keeps one for each test; what the first attempt left on `self` must not count.
        vars(item).pop("_instance", None)
        vars(item)["_obj"] = None
    make_request = getattr(item, "_initrequest", None)
    if make_request is not None:
        make_request()


def excinfos(item: pytest.Item) -> list[Any] | None:
    """Where a unittest test keeps its errors, which it does not raise."""
    found = getattr(item, "_excinfo", None)
    return found if isinstance(found, list) else None


def error_of_unittest(item: pytest.Item) -> BaseException | None:
    """What a unittest test failed with, if it did; pytest asks for it when it reports."""
    found = excinfos(item)
    value = getattr(found[0], "value", None) if found else None
    return value if isinstance(value, BaseException) else None


def kept_errors(item: pytest.Item) -> list[BaseException]:
    """Errors that pytest keeps and raises again for the next tests of a class or module.

    Those of fixtures and collectors whose set-up failed, as far as the private names show them.
    """
    found: list[Any] = [
        entry[1] for entry in getattr(_setup_state(item), "stack", {}).values() if len(entry) > 1
    ]
    info = getattr(item, "_fixtureinfo", None)
    for definitions in getattr(info, "name2fixturedefs", {}).values():
        for definition in definitions:
            result = getattr(definition, "cached_result", None)
            if result is not None:
                found.append(result[2])
    # Since pytest 8.1 with the traceback.
    errors = [each[0] if isinstance(each, tuple) and each else each for each in found]
    return [error for error in errors if isinstance(error, BaseException)]


def _setup_state(item: pytest.Item) -> Any:
    return getattr(item.session, "_setupstate", None)


def _lowest_sound_parent(item: pytest.Item) -> Any:
    """The collector nearest to the test whose own set-up has not failed.

    One whose set-up failed (`setup_module`) keeps its error for all its tests: it must be torn
    down too, to be set up again.
    """
    stack = getattr(_setup_state(item), "stack", {})
    for node in item.listchain()[:-1]:
        _, failure = stack.get(node, (None, None))
        if failure is not None:
            return node.parent
    return item.parent


def _forget_failed_fixtures(item: pytest.Item) -> None:
    """Let fixtures of wider scopes that failed run again; else what they raised is kept."""
    info = getattr(item, "_fixtureinfo", None)
    for definitions in getattr(info, "name2fixturedefs", {}).values():
        for definition in definitions:
            result = getattr(definition, "cached_result", None)
            if result is not None and result[2] is not None:
                # Finished as at the end of its scope, and not only emptied: pytest 9.1 and
                # newer insist on that before the next set-up.
                definition.finish(getattr(item, "_request", None))


def fixtures_of(item: pytest.Item) -> Any:
    """What knows the fixtures of a test, the same object for all of one function; None: unknown."""
    info = getattr(item, "_fixtureinfo", None)
    return info if hasattr(info, "name2fixturedefs") else None


def fixture_scopes(fixtures: Any) -> set[str]:
    """The scopes of the fixtures of a test, as `fixtures_of` gives them."""
    return {str(found[-1].scope) for found in fixtures.name2fixturedefs.values() if found}


def parameter_scopes(item: pytest.Item) -> set[str]:
    """The scopes for which the parameters of a test have one value."""
    scopes = getattr(getattr(item, "callspec", None), "_arg2scope", {})
    return {str(scope.value) for scope in scopes.values()}
