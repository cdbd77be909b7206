"""One attempt at a test, ended so that another can follow within the same protocol.

pytest has no public way to do that. What is used of it beside hooks is what pytest-rerunfailures
has used for years; where it is missing, nothing happens and the first attempt stands.
"""

from __future__ import annotations

from typing import Any

import pytest


class _StandIn(pytest.Item):
    """What comes after the attempt: shares everything with it but the function."""

    def runtest(self) -> None:
        """Never run."""


def end_function(item: pytest.Item) -> None:
    """Tear down what belongs to the test function alone; raises what the teardown raises.

    Fixtures of its class, module and session live on, but for those that failed.
    """
    following = _StandIn.from_parent(_lowest_sound_parent(item), name=item.name)
    item.ihook.pytest_runtest_teardown(item=item, nextitem=following)
    _forget_failed_fixtures(item)
    if (found := excinfos(item)) is not None:
        found.clear()


def renew(item: pytest.Item) -> None:
    """Give the test a request for fixtures anew, and an instance of its class: both are used."""
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


def _lowest_sound_parent(item: pytest.Item) -> Any:
    """The collector nearest to the test whose own set-up has not failed.

    One whose set-up failed (`setup_module`) keeps its error for all its tests: it must be torn
    down too, to be set up again.
    """
    state = getattr(item.session, "_setupstate", None)
    stack = getattr(state, "stack", {})
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
