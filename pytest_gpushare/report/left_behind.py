"""Leaks: VRAM that a test left behind and that nobody gave back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pytest_gpushare.run.crew import Member
from pytest_gpushare.run.leaks import LEAST_BY_NVML
from pytest_gpushare.run.started import Started

_MOST_SUSPECTS = 20


class Leak(NamedTuple):
    """What was left, and by which test."""

    size: int
    """Bytes."""
    worker: str
    source: str
    """`frameworks`: their counters around each test; `nvml`: readings a second apart."""
    suspects: tuple[str, ...]
    """Node ids: one where it is known which test it was, else the first of those that may be."""
    among: int = 1
    """How many these are."""


def leaks(started: Started) -> list[Leak]:
    """All leaks, the largest first."""
    found = [leak for member in started.crew for leak in _of(member, started)]
    return sorted(found, key=lambda leak: (-leak.size, leak.suspects))


def _of(member: Member, started: Started) -> Iterator[Leak]:
    if member.growths.told:
        for nodeid, size in member.growths.leaks():
            yield Leak(size, member.id, "frameworks", (nodeid,))
        return
    size = (member.kept or 0) - member.context
    if size <= LEAST_BY_NVML:
        return
    # By readings a second apart nobody can tell what one test left from what the next one took:
    # any test may have done it that ended after the last reading that was low.
    suspects = [
        test.nodeid
        for test in started.journal
        if test.worker == member.id and test.end is not None and test.end >= member.low_at
    ]
    if suspects:
        yield Leak(size, member.id, "nvml", tuple(suspects[:_MOST_SUSPECTS]), len(suspects))
