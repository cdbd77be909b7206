"""pytest's protocol of one test, with a question between its call and its teardown.

Private names of pytest that are used, all of `_pytest.runner` but for the item's:

- `call_and_report` (since pytest 2): makes, logs and reports one phase as pytest itself does.
- `show_test_item` (since 3.0): what `--setup-show` prints.
- `Session._setupstate` (since 2.4): what is set up.
- `item._request`, `item._initrequest` (since 2.3): requests for fixtures, made again where a test
  is run again.

Without one of them `run_phases` is None, and pytest's own protocol runs each test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest


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


def others_want_the_next_test(config: pytest.Config, own: object) -> bool:
    """Whether a plugin or conftest file has a protocol of its own, or sees the next test in one.

    A wrapper that does not name `nextitem` does neither.
    """
    runner = _runner()
    return any(
        found.plugin is not own
        and found.plugin is not runner
        and (
            not (found.hookwrapper or getattr(found, "wrapper", False))
            or "nextitem" in found.argnames
        )
        for found in config.hook.pytest_runtest_protocol.get_hookimpls()
    )


def tear_down_all(session: pytest.Session) -> None:
    """Tear down what is set up still; raises what that raises. Without pytest's stack: nothing."""
    state = getattr(session, "_setupstate", None)
    if state is not None:
        state.teardown_exact(None)
