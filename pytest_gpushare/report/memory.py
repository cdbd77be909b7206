"""The summary's lines of tests that ran out of memory, or took other than was known of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.report.line import Line
from pytest_gpushare.units import plural

if TYPE_CHECKING:
    from pytest_gpushare.run.record import Event
    from pytest_gpushare.run.started import Started

MOST = 10
"""Tests that are told one by one."""


def out_of_memory(started: Started) -> Iterator[Line]:
    """Each test that ran out of memory: beside whom, and how it went alone."""
    again = {event.facts["nodeid"]: event for event in started.record.events("oom-retried")}
    found = started.record.events("oom")
    texts = [_sentence(event, again.get(event.facts["nodeid"])) for event in found]
    yield from _first(texts, "ran out of VRAM: see their reports", problem=True)


def _sentence(event: Event, again: Event | None) -> str:
    if again is None:
        return event.text
    alone = "passed alone" if again.facts["outcome"] == "passed" else "failed alone"
    return f"{event.text}; {alone}"


def needs_exceeded(started: Started) -> Iterator[Line]:
    """Tests that took more than they were admitted with: their neighbours pay for it."""
    texts = [
        f"{text}: raise it, or let it be learned" for text in _latest(started, "need-exceeded")
    ]
    yield from _first(texts, "took more VRAM than their needs", problem=True)


def needs_changed(started: Started) -> Iterator[Line]:
    """Tests that took another amount than the one by which they are packed."""
    # Elsewhere nothing is admitted by what was learned, and nobody has to know.
    if "packed" in started.settings.presets:
        texts = [f"{text}: learned anew" for text in _latest(started, "need-changed")]
        yield from _first(texts, "took other VRAM than when they last ran", problem=False)


def _latest(started: Started, kind: str) -> list[str]:
    """The last event of this kind of each test, in words."""
    found = {event.facts["nodeid"]: event for event in started.record.events(kind)}
    return [event.text for event in found.values()]


def _first(texts: Sequence[str], others: str, *, problem: bool) -> Iterator[Line]:
    """A line for each of the first, and one that says of how many more the same is true."""
    for text in texts[:MOST]:
        yield Line(f"gpu-share: {text}", problem=problem)
    if len(texts) > MOST:
        more = plural(len(texts) - MOST, "test")
        yield Line(f"gpu-share: {more} more {others}", problem=problem)
