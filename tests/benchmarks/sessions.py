"""Random pairs and triples of sessions on one simulated device: is a test lost to a sibling?

    python -m tests.benchmarks.sessions [--rounds 10] [--first 0] [--leases on|off] [--crowd 20]

Each round draws two or three sessions whose tests need a third of the VRAM or more: with declared
needs or without, presets, workers, fixtures that stay, times to start; in some one session is
killed in the middle. It is played with leases and, as before there were any, without. A test
counts as lost if it does not pass, and a session as fallen back if it ran without the GPU.
`--crowd` starts so many sessions at once instead, with tests of 2 GB. The order in which they ask
for VRAM is compared with that in which they get it, and with that of their first tests: those also
wait for the processes of workers, which take a different time to start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pytest_gpushare.units import GB

from .scene import Scene, scene

MODULE = """
    import pathlib, time
    import gpusim, pytest

    @pytest.fixture(scope="session")
    def kept():
        return gpusim.alloc("{keeps}") if "{keeps}" else None

    @pytest.mark.parametrize("i", range({count}))
    @pytest.mark.gpu{need}
    def test_of_the_device(i, kept):
        began = time.time()
        with gpusim.alloc("{half}"):
            time.sleep({seconds} / 2)
            with gpusim.alloc("{half}"):
                time.sleep({seconds} / 2)
        with pathlib.Path("times").open("a") as file:
            print(began, time.time(), file=file)
"""

JOURNAL = """
    import functools, json, time
    from pytest_gpushare.leases.ledger import Ledger
    from pytest_gpushare.leases.lessee import Lessee

    def noted(function):
        @functools.wraps(function)
        def with_note(self, *args, **kwargs):
            began = time.time()
            found = function(self, *args, **kwargs)
            record = args[0] if isinstance(self, Ledger) else self.record
            leased = sum(share[0] for share in record.devices.values())
            with open("journal", "a") as file:
                print(json.dumps([function.__name__, began, leased]), file=file)
            return found
        return with_note

    Ledger.publish, Lessee.claim = noted(Ledger.publish), noted(Lessee.claim)
"""
"""A plugin: what a session publishes in the ledger, and when it asked for VRAM and got it."""

COMMAND = [
    *(sys.executable, "-m", "pytest"),
    *("-p", "no:cacheprovider", "-p", "journal", "--gpu-share"),
]

LIMIT = 300.0
"""Seconds that a session may take: on a machine with nothing else to do it takes ten."""

BUDGETS = {"no-ollama": 21.0, "no-ollama packed": 21.0, "packed": 9.0, "conservative": 9.0}
"""Preset -> GB of the device for tests."""


class Drawn(NamedTuple):
    """One session of a round."""

    module: str
    options: tuple[str, ...]
    count: int
    delay: float
    is_killed: bool

    def shown(self) -> str:
        """Its options, in a line of output."""
        return f"{' '.join(self.options)}, {self.count} tests, after {self.delay:.1f} s"


def drawn(seed: int) -> list[Drawn]:
    """The sessions of a round."""
    draw = random.Random(seed)
    number = draw.choice([2, 2, 3])
    victim = draw.randrange(number) if draw.random() < 0.3 else -1
    found = []
    for at in range(number):
        preset = draw.choice(list(BUDGETS))
        workers = draw.choice([1, 2])
        budget = BUDGETS[preset]
        declared = draw.random() < 0.6
        need = round(budget * draw.uniform(0.35, 0.8), 1)
        takes = need if declared else min(budget / workers, 14.0)
        keeps = draw.choice([0, 0, 0.3])
        count = 40 if at == victim else draw.randint(4, 7)
        module = MODULE.format(
            keeps=f"{keeps}GB" if keeps else "",
            count=count,
            need=f'(vram="{need}GB")' if declared else "",
            # A context is half a gigabyte.
            half=f"{(takes - keeps - 0.8) / 2:.2f}GB",
            seconds=round(draw.uniform(0.5, 1.0), 2),
        )
        options: tuple[str, ...] = ("-o", f"gpu_share_preset={preset}", f"-n{workers}")
        if not declared:
            # Nobody else says what its tests need at least.
            options += ("-o", f"gpu_share_min_vram_per_worker_gb={takes:.1f}")
        delay = draw.uniform(0.0, 2.0)
        found.append(Drawn(textwrap.dedent(module), options, count, delay, at == victim))
    return found


class Ended(NamedTuple):
    """What became of a session."""

    passed: int
    output: str
    seconds: float

    @property
    def ran_without_gpu(self) -> bool:
        """Whether it fell back to CPU workers."""
        return " GPU worker" not in self.output


class Running:
    """A session in the background."""

    def __init__(self, at: Scene, name: str, module: str, options: tuple[str, ...]) -> None:
        self.path = at.path.parent / name
        self.path.mkdir()
        (self.path / "test_project.py").write_text(module)
        (self.path / "journal.py").write_text(textwrap.dedent(JOURNAL))
        self._output = (self.path / "output").open("wb")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*COMMAND, *options],
            cwd=self.path,
            env=at.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def end(self) -> Ended:
        """Wait for it, and no longer than `LIMIT`."""
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.close()
        seconds = time.monotonic() - self.began
        text = (self.path / "output").read_text(errors="replace")
        match = re.search(r"(\d+) passed", text)
        return Ended(int(match.group(1)) if match else 0, text, seconds)

    def close(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._output.close()


def play(at: Scene, sessions: list[Drawn], *more: str) -> list[Ended]:
    """One round; the session that is killed has no tests to lose."""
    began = time.monotonic()
    running: list[Running] = []
    with ExitStack() as stack:
        for number, each in sorted(enumerate(sessions), key=lambda pair: pair[1].delay):
            time.sleep(max(0.0, began + each.delay - time.monotonic()))
            session = Running(at, f"s{number}", each.module, (*each.options, *more))
            stack.callback(session.close)
            running.append(session)
        order = sorted(range(len(sessions)), key=lambda n: sessions[n].delay)
        for number, session in zip(order, running, strict=True):
            if sessions[number].is_killed:
                until = time.monotonic() + 30
                while not (session.path / "times").exists() and time.monotonic() < until:
                    time.sleep(0.05)
                time.sleep(0.3)
                os.kill(session.process.pid, signal.SIGKILL)
        ended = {n: session.end() for n, session in zip(order, running, strict=True)}
    return [ended[number] for number in range(len(sessions))]


def times_of(path: Path) -> list[tuple[float, float]]:
    """When the tests of a session ran, in seconds since the epoch."""
    with suppress(OSError):
        rows = (line.split() for line in path.read_text().splitlines())
        return [(float(began), float(ended)) for began, ended in rows]
    return []


def overlap(sessions: list[list[tuple[float, float]]]) -> float:
    """Seconds in which tests of several sessions ran."""
    events = sorted(
        event
        for number, times in enumerate(sessions)
        for began, ended in times
        for event in ((began, 1, number), (ended, -1, number))
    )
    running: Counter[int] = Counter()
    total = 0.0
    for (at, step, number), (following, *_) in pairwise(events):
        running[number] += step
        if sum(count > 0 for count in running.values()) > 1:
            total += following - at
    return total


class Result(NamedTuple):
    """What became of a round, or of several."""

    lost: int = 0
    rounds_with_lost: int = 0
    out_of_memory: int = 0
    fallen_back: int = 0
    seconds: float = 0.0
    overlap: float = 0.0

    def __add__(self, other: Result) -> Result:  # type: ignore[override]
        return Result(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.lost} lost in {self.rounds_with_lost}, {self.out_of_memory} out of memory, "
            f"{self.fallen_back} without a GPU, {self.seconds:.0f} s, {self.overlap:.1f} s at once"
        )


def round_of(seed: int, *more: str) -> Result:
    """The sessions of a seed, once."""
    sessions = drawn(seed)
    with scene() as at:
        at.environment["PYTEST_GPUSHARE_LEASES"] = str(at.path.parent / "leases")
        ended = play(at, sessions, *more)
        times = [times_of(at.path.parent / f"s{n}" / "times") for n in range(len(sessions))]
    total = Result()
    for each, result in zip(sessions, ended, strict=True):
        if each.is_killed:
            continue
        missing = each.count - result.passed
        if missing:
            print(f"  seed {seed}: {each.shown()}: {result.passed} passed", flush=True)
            print(textwrap.indent(result.output[-2000:], "    "), file=sys.stderr, flush=True)
        memory = result.output.count("OutOfMemoryError")
        total += Result(missing, 0, memory, result.ran_without_gpu, 0.0)
    return total._replace(
        rounds_with_lost=int(total.lost > 0),
        seconds=max(result.seconds for result in ended),
        overlap=overlap(times),
    )


WAYS: dict[str, tuple[str, ...]] = {"on": (), "off": ("-o", "gpu_share_leases=off")}


def rounds(first: int, count: int, ways: Mapping[str, tuple[str, ...]]) -> None:
    """With leases and without, side by side."""
    totals = dict.fromkeys(ways, Result())
    for seed in range(first, first + count):
        kinds = [f"{'killed, ' * each.is_killed}{each.options[1][17:]}" for each in drawn(seed)]
        print(f"seed {seed}: {'; '.join(kinds)}", flush=True)
        for way, more in ways.items():
            result = round_of(seed, *more)
            totals[way] += result
            print(f"  leases {way}: {result}", flush=True)
    for way, total in totals.items():
        print(f"{count} rounds, leases {way}: {total}")


def crowd(count: int) -> None:
    """So many sessions at once on 24 GB, each with four tests of 2 GB."""
    module = textwrap.dedent(
        MODULE.format(keeps="", count=4, need='(vram="2GB")', half="500MB", seconds=0.3)
    )
    options = ("-o", "gpu_share_preset=no-ollama packed", "-n1")
    with scene() as at, ExitStack() as stack:
        ledger = at.path.parent / "leases"
        at.environment["PYTEST_GPUSHARE_LEASES"] = str(ledger)
        running = []
        for number in range(count):
            running.append(Running(at, f"s{number}", module, options))
            stack.callback(running[-1].close)
        ended = [session.end() for session in running]
        times = [times_of(session.path / "times") for session in running]
        found = [queued(session.path / "journal") for session in running]
    for result in ended:
        if result.passed < 4:
            print(textwrap.indent(result.output[:2000], "    "), file=sys.stderr, flush=True)
    asked = [each.asked for each in found]
    granted = [each.granted for each in found]
    sizes = [each.size for each in found]
    began = [min(each, default=(0.0, 0.0))[0] for each in times]
    without = sum("no VRAM is leased" in result.output for result in ended)
    print(
        f"{count} sessions at once: {sum(each.passed for each in ended)} of {4 * count} tests "
        f"passed, {without} without a lease, {max(r.seconds for r in ended):.0f} s"
    )
    for asked_at, got_at, began_at, size in sorted(zip(asked, granted, began, sizes, strict=True)):
        print(
            f"  {size / GB:4.1f} GB {got_at - asked_at:5.2f} s after it asked "
            f"({asked_at - min(asked):.3f} s), its first test {began_at - asked_at:5.2f} s after"
        )
    print(f"VRAM got in another order than asked for: {_disorder(asked, granted)}")
    print(f"first tests in another order than VRAM was got: {_disorder(granted, began)}")
    print(f"first tests in another order than asked for: {_disorder(asked, began)}")


class Queued(NamedTuple):
    """When a session asked for VRAM, and got it, in seconds since the epoch, and how much."""

    asked: float = 0.0
    granted: float = 0.0
    size: int = 0


def queued(journal: Path) -> Queued:
    """What a session notes of its start."""
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    asked = next(began for what, began, _ in notes if what == "claim")
    granted, size = next(((at, leased) for _, at, leased in notes if leased), (asked + LIMIT, 0))
    return Queued(asked, granted, size)


def _disorder(first: list[float], then: list[float]) -> str:
    """Pairs that are apart by more than `_TICK` in both, and in another order."""
    pairs = [
        (then[a] - then[b], a, b)
        for a in range(len(first))
        for b in range(len(first))
        if first[a] + _TICK < first[b]
    ]
    late = [by for by, _, _ in pairs if by > _TICK]
    return f"{len(late)} of {len(pairs)} pairs, by at most {max(late, default=0):.1f}"


_TICK = 0.05
"""Seconds between two moments whose order is certain: records are looked at now and then."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--leases", choices=WAYS, help="only with them, or only without")
    parser.add_argument("--crowd", type=int, default=0)
    options = parser.parse_args()
    if options.crowd:
        crowd(options.crowd)
    else:
        chosen = [options.leases] if options.leases else WAYS
        rounds(options.first, options.rounds, {way: WAYS[way] for way in chosen})


if __name__ == "__main__":
    main()
