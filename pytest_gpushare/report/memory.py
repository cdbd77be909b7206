"""The summary's lines of tests that ran out of memory, or took other than was known of them."""

from __future__ import annotations

from collections.abc import Iterator
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
    for event in found[:MOST]:
        yield Line(f"gpu-share: {_sentence(event, again.get(event.facts['nodeid']))}", problem=True)
    if len(found) > MOST:
        more = plural(len(found) - MOST, "test")
        yield Line(f"gpu-share: {more} more ran out of VRAM: see their reports", problem=True)


def _sentence(event: Event, again: Event | None) -> str:
    if again is None:
        return event.text
    alone = "passed alone" if again.facts["outcome"] == "passed" else "failed alone"
    return f"{event.text}; {alone}"


def needs_exceeded(started: Started) -> Iterator[Line]:
    """Tests that took more than they were admitted with: their neighbours pay for it."""
    found = {e.facts["nodeid"]: e for e in started.record.events("need-exceeded")}
    for event in list(found.values())[:MOST]:
        yield Line(f"gpu-share: {event.text}: raise it, or let it be learned", problem=True)
    if len(found) > MOST:
        more = plural(len(found) - MOST, "test")
        yield Line(f"gpu-share: {more} more took more VRAM than their needs", problem=True)


def needs_changed(started: Started) -> Iterator[Line]:
    """Tests that took another amount than the one by which they are packed."""
    # Elsewhere nothing is admitted by what was learned, and nobody has to know.
    if "packed" not in started.settings.presets:
        return
    found = {e.facts["nodeid"]: e for e in started.record.events("need-changed")}
    for event in list(found.values())[:MOST]:
        yield Line(f"gpu-share: {event.text}: learned anew")
    if len(found) > MOST:
        more = plural(len(found) - MOST, "test")
        yield Line(f"gpu-share: {more} more took other VRAM than when they last ran")
