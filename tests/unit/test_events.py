"""Events in order and bounded; messages that reach their handlers and nobody else."""

from __future__ import annotations

from typing import Any

from pytest_gpushare import events as record
from pytest_gpushare import wire as links_module
from pytest_gpushare.events import Record
from pytest_gpushare.wire import Link, Links


def test_events_have_their_time_and_are_found_by_kind() -> None:
    now = [100.0]
    kept = Record(clock=lambda: now[0])
    kept.note("oom", "test_a ran out of memory", worker="gw0")
    now[0] = 102.5
    kept.note("pressure", "somebody took 4 GB", bytes=4)
    assert [(event.at, event.kind) for event in kept.events()] == [(0.0, "oom"), (2.5, "pressure")]
    assert kept.events("pressure")[0].facts == {"bytes": 4}


def test_events_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(record, "MOST_EVENTS", 3)
    kept = Record()
    for number in range(5):
        kept.note("oom", str(number))
    assert ([event.text for event in kept.events()], kept.dropped) == (["0", "1", "2"], 2)


def test_messages_go_both_ways() -> None:
    links, heard, told = Links(), [], []
    links.on("peak", lambda worker, payload: heard.append((worker, payload)))
    link = Link(lambda message: links.receive("gw0", message))
    links.attach("gw0", link.receive)
    link.on("empty", told.append)
    link.send("peak", 7)
    link.send("nobody listens", 8)
    assert links.send("gw0", "empty", 9)
    assert not links.send("gw1", "empty", 9)
    links.close("gw0")
    assert not links.send("gw0", "empty", 10)
    assert (heard, told) == ([("gw0", 7)], [9])


def test_what_comes_early_is_kept_until_somebody_listens(monkeypatch: Any) -> None:
    monkeypatch.setattr(links_module, "MOST_EARLY", 2)
    links, heard = Links(), []
    for number in range(3):
        links.receive(f"gw{number}", ("collected", number))
    links.on("collected", lambda worker, payload: heard.append((worker, payload)))
    links.receive("gw3", ("collected", 3))
    assert heard == [("gw0", 0), ("gw1", 1), ("gw3", 3)]


def test_nonsense_and_failing_handlers_end_nothing() -> None:
    links, heard = Links(), []

    def fail(worker: str, payload: Any) -> None:
        raise ValueError(payload)

    links.on("peak", fail)
    links.on("peak", lambda _, payload: heard.append(payload))
    for message in (None, "peak", ("peak",), ("peak", 1)):
        links.receive("gw0", message)
    assert heard == [1]


def test_a_controller_that_is_gone_hears_nothing() -> None:
    def send(message: Any) -> None:
        raise OSError("cannot send (already closed?)")

    Link(send).send("peak", 1)
    links = Links()
    links.attach("gw0", send)
    assert not links.send("gw0", "peak", 1)
