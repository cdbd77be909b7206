"""Random pairs and triples of sessions on one simulated device: is a test lost to a sibling?

    python -m tests.benchmarks.sessions [--rounds 25] [--first 0] [--off] [--crowd 20]

Each round draws two or three sessions: with declared needs or without, presets, workers, fixtures
that stay, times to start; in some one session is killed in the middle. A test counts as lost if it
does not pass, and a session as fallen back if it ran without the GPU. `--off` runs the same rounds
with leases off, as before there were any; `--crowd` starts so many sessions at once instead, with
tests of 2 GB, and compares the order of their first tests with that of their start.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from .scene import Scene, scene

MODULE = """
    import os, pathlib, time
    import gpusim, pytest

    @pytest.fixture(scope="session")
    def kept():
        return gpusim.alloc("{keeps}") if "{keeps}" else None

    @pytest.mark.parametrize("i", range({count}))
    @pytest.mark.gpu{need}
    def test_of_the_device(i, kept):
        with gpusim.alloc("{takes}"):
            path = pathlib.Path("began")
            if not path.exists():
                path.write_text(repr(time.time()))
            time.sleep({seconds})
"""

LIMIT = 900.0
"""Seconds that a session may take: on a machine with nothing else to do it takes ten."""


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
    victim = draw.randrange(number) if draw.random() < 0.25 else -1
    found = []
    for at in range(number):
        size = draw.choice([2, 4, 6, 8])
        declared = draw.random() < 0.6
        preset = draw.choice(["no-ollama", "no-ollama packed", "conservative", "aggressive"])
        count = 60 if at == victim else draw.randint(3, 6)
        module = MODULE.format(
            keeps=draw.choice(["", "", "300MB"]),
            count=count,
            need=f'(vram="{size}GB")' if declared else "",
            takes=f"{size - 1}GB" if declared else "1.8GB",
            seconds=round(draw.uniform(0.05, 0.4), 2),
        )
        options = ("-o", f"gpu_share_preset={preset}", f"-n{draw.choice([1, 2])}")
        delay = draw.choice([0.0, draw.uniform(0.0, 3.0)])
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
        self._output = (self.path / "output").open("wb")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--gpu-share", *options],
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
                while not (session.path / "began").exists() and time.monotonic() < until:
                    time.sleep(0.05)
                os.kill(session.process.pid, signal.SIGKILL)
        ended = {n: session.end() for n, session in zip(order, running, strict=True)}
    return [ended[number] for number in range(len(sessions))]


def rounds(first: int, count: int, *more: str) -> None:
    lost = failed = fallen = memory = 0
    for seed in range(first, first + count):
        sessions = drawn(seed)
        with scene() as at:
            at.environment["PYTEST_GPUSHARE_LEASES"] = str(at.path.parent / "leases")
            ended = play(at, sessions, *more)
        missing = 0
        for each, result in zip(sessions, ended, strict=True):
            if each.is_killed:
                continue
            missing += each.count - result.passed
            fallen += result.ran_without_gpu
            memory += result.output.count("OutOfMemoryError")
            if each.count != result.passed:
                print(f"  seed {seed}: {each.shown()}: {result.passed} passed", flush=True)
                print(textwrap.indent(result.output[-2000:], "    "), file=sys.stderr, flush=True)
        lost += missing
        failed += bool(missing)
        took = max(result.seconds for result in ended)
        print(f"seed {seed}: {len(sessions)} sessions, {missing} lost, {took:.0f} s", flush=True)
    print(
        f"{count} rounds: {failed} with lost tests, {lost} tests lost, {memory} times out of "
        f"memory, {fallen} sessions without a GPU"
    )


def crowd(count: int) -> None:
    """So many sessions at once on 24 GB, each with four tests of 2 GB."""
    module = textwrap.dedent(
        MODULE.format(keeps="", count=4, need='(vram="2GB")', takes="1GB", seconds=0.3)
    )
    options = ("-o", "gpu_share_preset=no-ollama packed", "-n1")
    with scene() as at, ExitStack() as stack:
        at.environment["PYTEST_GPUSHARE_LEASES"] = str(at.path.parent / "leases")
        running = []
        for number in range(count):
            running.append(Running(at, f"s{number}", module, options))
            stack.callback(running[-1].close)
        asked = asked_at(at, running)
        ended = [session.end() for session in running]
        began = [
            float(path.read_text()) if (path := session.path / "began").exists() else 0.0
            for session in running
        ]
    passed = [result.passed for result in ended]
    pairs = [(a, b) for a in range(count) for b in range(count) if asked[a] + 0.05 < asked[b]]
    late = [began[a] - began[b] for a, b in pairs if began[b] < began[a]]
    print(
        f"{count} sessions at once: {sum(passed)} of {4 * count} tests passed, first tests of "
        f"{len(late)} of {len(pairs)} pairs out of order, at most "
        f"{max(late, default=0):.1f} s, {max(r.seconds for r in ended):.0f} s"
    )


def asked_at(at: Scene, running: list[Running]) -> list[float]:
    """When each of the sessions asked for VRAM first, in seconds since the epoch."""
    found: dict[int, float] = {}
    pids = {session.process.pid for session in running}
    until = time.monotonic() + LIMIT
    while found.keys() != pids and time.monotonic() < until:
        for path in Path(at.environment["PYTEST_GPUSHARE_LEASES"]).glob("s-*.json"):
            with suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                found[record["pid"]] = record["began"]
        if all(session.process.poll() is not None for session in running):
            break
        time.sleep(0.02)
    return [found.get(session.process.pid, 0.0) for session in running]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--off", action="store_true")
    parser.add_argument("--crowd", type=int, default=0)
    options = parser.parse_args()
    if options.crowd:
        crowd(options.crowd)
        return
    more = ("-o", "gpu_share_leases=off") if options.off else ()
    rounds(options.first, options.rounds, *more)


if __name__ == "__main__":
    main()
