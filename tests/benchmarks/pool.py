"""CPU and GPU tests in one pool: against `-n 2` for all, and what the dispatch itself costs.

    python -m tests.benchmarks.pool [founding | cost | needs ...] [--pairs 5]

The founding case: 400 CPU tests of 0.05 s and 20 GPU tests of 0.5 s and 4 GB on one device of
24 GB with Ollama's reservation. The cost: 3,000 tests that do nothing, on two CPU workers and an
idle GPU worker, against xdist's own `-n 2`; marked tests that do nothing; and 6,500 tests that do
nothing on two GPU workers, all with a need, against `-n 2`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .scene import LIMIT, PYTEST, Scene, scene

MIXED = """
import time
import gpusim
import pytest

@pytest.mark.parametrize("i", range(400))
def test_cpu(i):
    time.sleep(0.05)

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(20))
def test_gpu(i):
    with gpusim.alloc("4GB"):
        time.sleep(0.5)
"""
NOTHING = """
import pytest

@pytest.mark.parametrize("i", range(3000))
def test_nothing(i):
    pass
"""
MARKED = NOTHING.replace("@pytest.mark.par", "@pytest.mark.gpu\n@pytest.mark.par", 1)
# What the controller spends between the first report and the last.
METER = """
import json, time

class Meter:
    first = last = None

    def pytest_runtest_logreport(self, report):
        now = time.perf_counter(), time.process_time()
        self.first = self.first or now
        self.last = now

    def pytest_sessionfinish(self):
        if self.first:
            wall, cpu = (end - begin for begin, end in zip(self.first, self.last))
            with open("spent.json", "w") as file:
                json.dump([wall, cpu], file)

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Meter())
"""
ASKED = ("--gpu-share", "-o", "gpu_share_max_workers_per_gpu=1", "-o")
"""One GPU worker; the last word takes a setting."""

NEED_OF_ALL = "gpu_share_vram=* = 1GB"


class Spent(NamedTuple):
    """Seconds from the first report to the last."""

    wall: float
    cpu: float
    """Of the controller."""


def run(where: Scene, *arguments: str) -> Spent:
    """One run of the suite; stops the benchmark where it fails."""
    done = subprocess.run(
        [*PYTEST, *arguments],
        cwd=where.path,
        env=where.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Spent(*json.loads((where.path / "spent.json").read_text()))


def interleaved(
    where: Scene, ours: Sequence[str], theirs: Sequence[str], pairs: int
) -> list[tuple[Spent, Spent]]:
    """Both runs so many times, alternating which goes first."""
    found = []
    for number in range(pairs):
        if number % 2:
            second = run(where, *theirs)
            found.append((run(where, *ours), second))
        else:
            found.append((run(where, *ours), run(where, *theirs)))
    return found


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Geometric mean of the first by the second."""
    return math.exp(statistics.fmean(math.log(one / other) for one, other in pairs))


def founding_case(pairs: int) -> None:
    """Two GPU and four CPU workers against two workers for all."""
    with scene(MIXED, context="300MB") as where:
        (where.path / "conftest.py").write_text(METER)
        ours = ("--gpu-share", "-o", "gpu_share_cpu_workers=4")
        found = interleaved(where, ours, ("-n", "2"), pairs)
        oom = where.machine.snapshot()[0].oom_count
    mine, theirs = (statistics.median(s[at].wall for s in found) for at in (0, 1))
    # 20 tests of 0.5 s two at a time; 400 tests of 0.05 s on four workers.
    bound = max(20 * 0.5 / 2, 400 * 0.05 / 4)
    print(f"founding case: {mine:.2f} s against {theirs:.2f} s with -n 2: "
          f"{ratio([(b.wall, a.wall) for a, b in found]):.2f} x faster, "
          f"{mine / bound:.2f} x the bound of {bound:.1f} s; {oom} OOMs")  # fmt: skip


def cost(pairs: int) -> None:
    """Tests that do nothing, unmarked and marked."""
    with scene(NOTHING) as where:
        (where.path / "conftest.py").write_text(METER)
        ours = (*ASKED, "gpu_share_cpu_workers=2")
        found = interleaved(where, ours, ("-n", "2"), pairs)
        speed = ratio([(theirs.wall, mine.wall) for mine, theirs in found])
        cpu = ratio([(mine.cpu, theirs.cpu) for mine, theirs in found])
        print(f"3,000 tests that do nothing: {speed:.3f} x the tests/s of -n 2 (load), "
              f"controller's CPU time {cpu:.3f} x")  # fmt: skip
        unmarked = statistics.median(mine.wall for mine, _ in found)
        # Unmarked ones on one CPU worker against marked ones on one GPU worker.
        one = (*ASKED, "gpu_share_cpu_workers=1")
        alone = [run(where, *one).wall for _ in range(pairs)]
        (where.path / "test_project.py").write_text(MARKED)
        marked = [run(where, *one).wall for _ in range(pairs)]
        more = (statistics.median(marked) - statistics.median(alone)) / 3000 * 1000
        print(f"a marked test that does nothing: {more:.2f} ms more than an unmarked one "
              f"({unmarked / 3:.2f} ms per test on two CPU workers)")  # fmt: skip


def needs(pairs: int) -> None:
    """Tests that do nothing and all have a need."""
    with scene(NOTHING.replace("3000", "6500")) as where:
        (where.path / "conftest.py").write_text(METER)
        ours = ("--gpu-share", "-n", "2", "--gpu-share-preset=no-ollama", "-o", NEED_OF_ALL)
        found = interleaved(where, ours, ("-n", "2"), pairs)
    speeds = [theirs.wall / mine.wall for mine, theirs in found]
    print(f"6,500 tests that do nothing, each with a need of 1 GB: "
          f"{ratio([(theirs.wall, mine.wall) for mine, theirs in found]):.3f} x the tests/s of "
          f"-n 2 (load), {min(speeds):.3f} to {max(speeds):.3f}")  # fmt: skip


PARTS = {"founding": founding_case, "cost": cost, "needs": needs}


def main() -> None:
    """Measure each part, or those that are named, and print a line for each result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in options.parts or PARTS:
        PARTS[name](options.pairs)


if __name__ == "__main__":
    main()
