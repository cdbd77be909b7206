"""Workers killed at random moments of runs of 160 tests, and what became of the tests.

`python -m tests.benchmarks.kills 1000`: about a second for each killed worker. No test may be
missing, begun twice, or have two reports of a phase; a worker that is killed within a test makes
one crash report, of that test. `--stock` does the same without the plugin, to try the rules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from .scene import LIMIT, Scene, scene

from fidelity.runs import NEEDS, OURS, Run, run  # isort: skip - scene sets the path

TESTS = 160
WORKERS = 4
SUITE = f"""
import time
import pytest

@pytest.fixture(scope="module")
def module():
    yield
    time.sleep(0.01)

@pytest.fixture
def function():
    time.sleep(0.002)
    yield
    time.sleep(0.002)

@pytest.mark.parametrize("i", range({TESTS // 4}))
def test_short(i):
    pass

@pytest.mark.parametrize("i", range({TESTS // 2}))
def test_fixtures(i, module, function):
    time.sleep(0.01 + 0.002 * (i % 10))

class TestClass:
    @pytest.mark.parametrize("i", range({TESTS // 4}))
    def test_method(self, i, function):
        time.sleep(0.03)
"""


class Killer:
    """Kills workers of a run at random moments, from a thread of its own."""

    def __init__(self, place: Path, dice: random.Random, most: int) -> None:
        self.killed: set[str] = set()
        self._place, self._dice, self._most = place, dice, most
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10.0)

    def _kill(self) -> None:
        while len(self.killed) < self._most and not self._over.wait(self._dice.uniform(0, 0.4)):
            names = {path.suffix[1:] for path in self._place.glob("record.*")}
            victims = sorted(names - self.killed - {"controller"})
            if victims:
                victim = self._dice.choice(victims)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(victim), signal.SIGKILL)
                    self.killed.add(victim)


def wrong(done: Run, killed: set[str]) -> list[str]:
    """Which rules a run broke."""
    found = [f"exit code {done.code}"] if done.code not in (0, 1) else []
    found += [f"INTERNALERROR: {text.strip()[-200:]}" for text in done.internal_errors]
    phases = Counter((it["nodeid"], it["when"]) for it in done.reports)
    found += [f"begun {n} times: {name}" for name, n in done.begun.items() if n > 1]
    found += [f"{n} reports of {when}: {name}" for (name, when), n in phases.items() if n > 1]
    crashed = set(done.crashed)
    names = {name for name, _ in phases}
    found += [f"missing: {nodeid}" for nodeid in sorted(done.collected - names)]
    for nodeid in sorted(names - crashed):
        whens = {when for name, when in phases if name == nodeid}
        if whens != {"setup", "call", "teardown"}:
            found.append(f"only reports of {sorted(whens)}: {nodeid}")
    if len(done.collected) != TESTS:
        found.append(f"{len(done.collected)} tests collected")
    within, between = 0, 0
    for pid in killed:
        rows = done.workers.get(pid, [])
        steps = [row for row in rows if row[1] in ("begun", "ended")]
        if steps and steps[-1][1] == "begun":
            within += 1
            if steps[-1][2] not in crashed:
                found.append(f"{pid} was killed in a test that has no crash report: {steps[-1][2]}")
        elif steps or any(row[1] == "collected" for row in rows):
            between += 1
    if not within <= len(crashed) <= within + between:
        found.append(f"{len(crashed)} crashed, {within} workers killed in a test")
    return found


def main() -> None:
    """Print what was wrong with each run; exit code 1 where anything was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workers", type=int, nargs="?", default=100, help="how many are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="without the plugin")
    options = parser.parse_args()
    killed = runs = bad = crashes = 0
    start = time.monotonic()
    with scene(SUITE) as here:
        while killed < options.workers:
            dice = random.Random(options.seed + runs)
            done, victims = _once(here, dice, options.stock)
            found = wrong(done, victims)
            if not options.stock and not done.own_scheduler:
                found.append("the own scheduler was not in charge")
            killed += len(victims)
            crashes += len(done.crashed)
            bad += bool(found)
            print(f"seed {options.seed + runs}: {len(victims)} killed, {len(done.crashed)} crashed")
            for text in found:
                print("  -", text, flush=True)
            runs += 1
    print(
        f"{runs} runs of {TESTS} tests, {killed} workers killed, {crashes} crash reports, "
        f"{time.monotonic() - start:.0f} s: {bad} runs with a fault"
    )
    raise SystemExit(bool(bad))


def _once(here: Scene, dice: random.Random, stock: bool) -> tuple[Run, set[str]]:
    with tempfile.TemporaryDirectory(dir=here.path.parent) as directory:
        place = Path(directory) / "run"
        ours = () if stock else (*OURS, *NEEDS)
        arguments = ["-n", str(WORKERS), "--max-worker-restart=1000", "-p", "no:cacheprovider"]
        with Killer(place, dice, dice.randint(3, 8)) as killer:
            done = run(here.path, place, [*arguments, *ours], here.environment, timeout=LIMIT)
        return done, killer.killed


if __name__ == "__main__":
    main()
