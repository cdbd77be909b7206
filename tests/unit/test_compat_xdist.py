"""xdist's private names: what is done with them, and what happens where one is missing."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.compat.xdist_events import (
    collection_difference,
    count_tests,
    interactor_of,
    is_ending,
    wake,
)


class Channel:
    def __init__(self) -> None:
        self.callback: Any = None
        self.end: Any = None
        self.sent: list[Any] = []

    def setcallback(self, callback: Any, endmarker: Any) -> None:
        assert self.callback is None, "execnet refuses a second callback"
        self.callback, self.end = callback, endmarker

    def send(self, message: Any) -> None:
        self.sent.append(message)


class WorkerInteractor:
    def __init__(self) -> None:
        self.channel: Any = Channel()
        self.item_index = -1

    def run(self) -> int:
        return self.item_index

    def sendevent(self, name: str, **payload: Any) -> None:
        self.channel.send((name, payload))


def config_with(plugin: object) -> Any:
    return SimpleNamespace(pluginmanager=SimpleNamespace(get_plugins=lambda: [object(), plugin]))


def test_events() -> None:
    plugin = WorkerInteractor()
    interactor = interactor_of(config_with(plugin))
    assert interactor is not None
    interactor.begin(3)
    assert plugin.item_index == 3
    interactor.complete(3, 0.5)
    interactor.send("asked", 3, "end")
    assert plugin.channel.sent == [
        ("runtest_protocol_complete", {"item_index": 3, "duration": 0.5}),
        ("unscheduled", {"indices": ["asked", 3, "end"]}),
    ]


@pytest.mark.parametrize("name", ["channel", "sendevent"])
def test_without_a_name_of_the_worker(name: str) -> None:
    """There is no loop of ours then, and the worker says so."""
    names = {"channel": Channel(), "sendevent": print, "run": WorkerInteractor.run}
    other = type("WorkerInteractor", (), names)
    assert interactor_of(config_with(other())) is not None
    delattr(other, name)
    assert interactor_of(config_with(other())) is None
    assert interactor_of(config_with(object())) is None


def test_commands_are_handed_over() -> None:
    """xdist's own loop hears all of them, in order, those that came before among them."""
    plugin = WorkerInteractor()
    channel = plugin.channel
    interactor = interactor_of(config_with(plugin))
    assert interactor is not None
    ends: list[bool] = []
    commands = interactor.listen(ends.append)
    channel.callback(("runtests", {"indices": [0]}))
    assert ends == [False]
    commands.hand_over()
    heard: list[Any] = []
    plugin.channel.setcallback(heard.append, endmarker="END")
    channel.callback(("shutdown", {}))
    channel.callback(channel.end)
    assert heard == [("runtests", {"indices": [0]}), ("shutdown", {}), "END"]
    assert ends == [False]
    plugin.sendevent("logstart")
    assert channel.sent == [("logstart", {})]


def test_commands_that_end_the_worker() -> None:
    plugin = WorkerInteractor()
    channel = plugin.channel
    interactor = interactor_of(config_with(plugin))
    assert interactor is not None
    ends: list[bool] = []
    interactor.listen(ends.append).forget()
    for message in (("steal", {"indices": []}), ("shutdown", {}), channel.end):
        channel.callback(message)
    assert ends == [False, True, True]


def test_wake() -> None:
    """By an event that changes nothing; without the method nothing happens."""
    events: list[Any] = []
    node = SimpleNamespace(notify_inproc=lambda name, **more: events.append((name, more)))
    wake(node)
    assert events == [("unscheduled", {"node": node, "indices": []})]
    wake(SimpleNamespace())
    wake(None)


def test_whether_the_run_is_ending() -> None:
    """Without xdist's plugin, or its attribute, it is not."""
    for plugin, ending in (
        (SimpleNamespace(shuttingdown=True), True),
        (SimpleNamespace(shuttingdown=False), False),
        (SimpleNamespace(shuttingdown=False, shouldstop="interrupted"), True),
        (SimpleNamespace(), False),
        (None, False),
    ):
        plugins: Any = SimpleNamespace(get_plugin={"dsession": plugin}.get)
        assert is_ending(plugins) is ending


def test_different_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """xdist's own words, or ours where it has none."""
    assert collection_difference(["a"], ["a"], "gw0", "gw1") == ""
    text = collection_difference(["a"], ["b"], "gw0", "gw1")
    assert text.startswith("Different tests were collected between gw0 and gw1.")
    assert "+b" in text
    monkeypatch.setitem(sys.modules, "xdist.report", SimpleNamespace())
    assert collection_difference(["a"], ["b"], "gw0", "gw1") == (
        "Different tests were collected between gw0 and gw1"
    )


def test_what_the_terminal_counts_up_to() -> None:
    """The tests of all workers; without pytest's session nothing is counted."""
    session = SimpleNamespace(testscollected=3)
    plugins: Any = SimpleNamespace(get_plugin={"session": session}.get)
    count_tests(plugins, 8)
    assert session.testscollected == 8
    count_tests(SimpleNamespace(get_plugin=lambda _name: None), 8)  # type: ignore[arg-type]
