"""The true history of a machine's VRAM, from the simulator's log of every change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from simulator.store import log_of


class Stretch(NamedTuple):
    """For how long so much was held; times in seconds since the epoch."""

    start: float
    end: float
    size: int


class History:
    """Who held what, and when."""

    def __init__(self, state: Path, end: float) -> None:
        """`end`: when the run was over."""
        lines = [json.loads(line) for line in log_of(state).read_text().splitlines()]
        self._lines: list[dict[str, Any]] = sorted(lines, key=lambda line: line["at"])
        self._end = end
        self._owners: dict[int, str] = {}
        for line in self._lines:
            if line["worker"]:
                self._owners[line["pid"]] = line["worker"]

    def device(self, at: int) -> list[Stretch]:
        """What was in use on a device."""
        return self._stretches(lambda line: int(line["used"][at]))

    def tests(self, at: int) -> list[Stretch]:
        """What all workers and their descendants held on a device."""
        return self._stretches(
            lambda line: sum(
                size for device, pid, size in line["held"] if device == at and pid in self._owners
            )
        )

    def worker(self, name: str) -> list[Stretch]:
        """What a worker and its descendants held, on the device where that was the most."""

        def most(line: dict[str, Any]) -> int:
            held: dict[int, int] = {}
            for device, pid, size in line["held"]:
                if self._owners.get(pid) == name:
                    held[device] = held.get(device, 0) + size
            return max(held.values(), default=0)

        return self._stretches(most)

    def _stretches(self, size_of: Callable[[dict[str, Any]], int]) -> list[Stretch]:
        ends = [*(line["at"] for line in self._lines[1:]), max(self._end, self._lines[-1]["at"])]
        return [
            Stretch(line["at"], end, size_of(line))
            for line, end in zip(self._lines, ends, strict=True)
        ]


def within(stretches: list[Stretch], start: float, end: float) -> list[Stretch]:
    """The parts of stretches in this time."""
    return [
        Stretch(max(start, s.start), min(end, s.end), s.size)
        for s in stretches
        if s.start <= end and s.end >= start
    ]


def highest(stretches: list[Stretch]) -> int:
    """The most that was held."""
    return max((stretch.size for stretch in stretches), default=0)


def at(stretches: list[Stretch], moment: float) -> int:
    """What was held at a moment."""
    found = [s.size for s in stretches if s.start <= moment <= s.end]
    return min(found, default=0)


def plateaus(stretches: list[Stretch], least: int) -> Iterator[tuple[float, float]]:
    """The times in which at least so much was held without a break."""
    start: float | None = None
    end = 0.0
    for stretch in stretches:
        if stretch.size >= least:
            start = stretch.start if start is None else start
            end = stretch.end
        elif start is not None:
            yield start, end
            start = None
    if start is not None:
        yield start, end
