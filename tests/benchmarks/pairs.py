"""Commands timed in interleaved pairs, so that a machine that slows down slows both."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 300.0
"""Seconds that one command may take."""

# Student's t for a two-sided 95 % interval, by degrees of freedom; the nearest lower one counts.
_T_95 = {1: 12.71, 2: 4.30, 4: 2.78, 9: 2.26, 19: 2.09, 29: 2.05, 39: 2.02, 99: 1.98}


class Ratio(NamedTuple):
    """How much longer the first command takes than the second."""

    pairs: int
    first: float
    """Median seconds of the first command."""
    second: float
    """Median seconds of the second command."""
    ratio: float
    """Geometric mean of first / second over the pairs."""
    low: float
    high: float

    def row(self, name: str) -> str:
        """A row of the table."""
        return (
            f"| {name} | {self.pairs} | {self.first * 1000:.0f} ms | {self.second * 1000:.0f} ms "
            f"| {self.ratio:.3f} | {self.low:.3f} to {self.high:.3f} |"
        )


HEAD = (
    "| comparison | pairs | first, median | second, median | ratio | 95 % interval |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def compare(
    first: Sequence[str],
    second: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    pairs: int,
) -> Ratio:
    """Run both commands so many times, alternating which goes first. One pair warms up."""
    times: list[tuple[float, float]] = []
    for number in range(pairs + 1):
        commands = [(0, first), (1, second)]
        measured = [0.0, 0.0]
        for position, command in commands if number % 2 else reversed(commands):
            measured[position] = seconds(command, cwd, environment)
        if number:
            times.append((measured[0], measured[1]))
    logs = [math.log(one / other) for one, other in times]
    mean = statistics.fmean(logs)
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    t = _T_95[max(n for n in _T_95 if n <= max(1, len(logs) - 1))]
    return Ratio(
        pairs,
        statistics.median(one for one, _ in times),
        statistics.median(other for _, other in times),
        math.exp(mean),
        math.exp(mean - t * spread),
        math.exp(mean + t * spread),
    )


def seconds(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> float:
    """Wall time of one command; stops the benchmark where it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, env=dict(environment), capture_output=True, text=True, timeout=LIMIT
    )
    took = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return took
