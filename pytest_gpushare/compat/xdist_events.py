"""xdist's events and commands, in a worker and in the controller.

Names that are used in a worker, all of `xdist.remote.WorkerInteractor` (since xdist 1, the class
under this name since 2.0):

- `channel`: where xdist's commands arrive; the run loop reads them beside our own messages.
- `sendevent`: `runtest_protocol_complete` (since 3.0) says that a test is over, `unscheduled`
  (since 3.2) carries what the controller must receive in its own thread, in order with the reports.
- `item_index`: the test that reports belong to.

Without one of them `interactor_of` is None, the worker says so before it is sent anything, and
xdist schedules the run.

Names that are used in the controller:

- `WorkerController.notify_inproc` (since 1.0): puts an event into xdist's queue. The event
  `unscheduled` (since 3.2) without tests changes nothing, and has xdist call its scheduler.
  Without it a test that waits for VRAM is looked at again when a worker reports the next time.
- The plugin `dsession`, its `shuttingdown` and `shouldstop` (since 1.0): whether the run is ending.
  Without them tests are handed out until the workers are gone.
- The plugin `session`, its `testscollected` (pytest 2.4): what the terminal counts up to. xdist
  sets it to the number of tests of the last worker that collected. Without it that stays.
- `xdist.report.report_collection_diff` (since 1.0): the text of an error. Without it the text is
  our own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest

_CLASS = "WorkerInteractor"


def interactor_of(config: pytest.Config) -> Interactor | None:
    """xdist's object in this worker; None where there is none with all that is needed."""
    for plugin in config.pluginmanager.get_plugins():
        if type(plugin).__name__ == _CLASS:
            channel = getattr(plugin, "channel", None)
            fits = (
                callable(getattr(channel, "setcallback", None))
                and callable(getattr(plugin, "sendevent", None))
                and _uses(type(plugin), "item_index")
            )
            return Interactor(plugin) if fits else None
    return None


def _uses(kind: type, name: str) -> bool:
    """Whether a method of the class names this attribute, which may be set later."""
    codes = (
        getattr(each, "__code__", None) for base in kind.__mro__ for each in vars(base).values()
    )
    return any(name in code.co_names for code in codes if code is not None)


class Interactor:
    """What a run loop of our own needs of xdist."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin

    def listen(self, receive: Callable[[bool], object]) -> Commands:
        """Take xdist's commands from now on: `receive` gets for each whether it ends the worker."""
        return Commands(self._plugin, receive)

    def begin(self, index: int) -> None:
        """From now on reports belong to this test."""
        self._plugin.item_index = index

    def complete(self, index: int, seconds: float) -> None:
        """The protocol of this test is over."""
        self._plugin.sendevent("runtest_protocol_complete", item_index=index, duration=seconds)

    def send(self, kind: str, *payload: Any) -> None:
        """Send the dispatcher a message, which it receives in xdist's own thread."""
        self._plugin.sendevent("unscheduled", indices=[kind, *payload])


class Commands:
    """xdist's commands to this worker, kept for xdist's own run loop until it takes over."""

    def __init__(self, plugin: Any, receive: Callable[[bool], object]) -> None:
        self._plugin = plugin
        self._receive = receive
        self._lock = threading.Lock()
        self._kept: list[Any] | None = []
        self._callback: Callable[[Any], object] | None = None
        self._end_marker: Any = None
        plugin.channel.setcallback(self._on_message, endmarker=_END)

    def _on_message(self, message: Any) -> None:
        with self._lock:
            if self._callback is None:
                if self._kept is not None:
                    self._kept.append(message)
                # The name of a command comes first; only `shutdown` ends a worker.
                ends = message is _END or (isinstance(message, tuple) and message[0] == "shutdown")
                self._receive(ends)
            else:
                self._callback(self._end_marker if message is _END else message)

    def forget(self) -> None:
        """Our own loop runs the tests: keep nothing for xdist's."""
        with self._lock:
            self._kept = None

    def hand_over(self) -> None:
        """Let xdist's own run loop have the commands, those that came already among them."""
        self._plugin.channel = _HandedOver(self._plugin.channel, self._connect)

    def _connect(self, callback: Callable[[Any], object], endmarker: Any = None) -> None:
        with self._lock:
            self._callback, self._end_marker = callback, endmarker
            kept, self._kept = self._kept, None
            for message in kept or ():
                callback(endmarker if message is _END else message)


class _HandedOver:
    """A channel of which somebody else has the callback already."""

    def __init__(self, channel: Any, connect: Callable[..., None]) -> None:
        self._channel = channel
        self.setcallback = connect

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


_END = object()


def wake(node: Any) -> None:
    """Have xdist call the scheduler in its own thread, by an event that changes nothing."""
    notify = getattr(node, "notify_inproc", None)
    if notify is not None:
        notify("unscheduled", node=node, indices=[])


def is_ending(plugins: pytest.PytestPluginManager) -> bool:
    """Whether xdist has ended the workers, or is about to."""
    session = plugins.get_plugin("dsession")
    return bool(getattr(session, "shuttingdown", False) or getattr(session, "shouldstop", False))


def count_tests(plugins: pytest.PytestPluginManager, number: int) -> None:
    """Let the terminal count up to this number of tests."""
    session = plugins.get_plugin("session")
    if session is not None:
        session.testscollected = number


def collection_difference(
    first: Sequence[str], second: Sequence[str], first_id: str, second_id: str
) -> str:
    """Why these two workers cannot run the same tests; empty where they collected the same."""
    if list(first) == list(second):
        return ""
    with contextlib.suppress(ImportError, AttributeError):
        report = import_module("xdist.report")
        return str(report.report_collection_diff(first, second, first_id, second_id))
    return f"Different tests were collected between {first_id} and {second_id}"
