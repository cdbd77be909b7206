"""Random suites, run by stock pytest, by stock xdist, and by the plugin's own dispatch.

`python -m tests.benchmarks.random_suites 200 --first 1000`: about 4 seconds for each suite.
The test suite runs ten of them, or as many as GPUSHARE_RANDOM_SUITES says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from .scene import PYTEST, Scene, scene

from dispatching.suites import Happened, Suite, differences  # isort: skip - scene sets the path


def run(seed: int, place: Scene) -> tuple[int, list[str]]:
    """How many tests the suite of this seed has, and what was wrong."""
    with tempfile.TemporaryDirectory(dir=place.path.parent) as directory:
        path = Path(directory)
        suite = Suite(path, seed)
        suite.write()
        found, wrong = [], []
        for arguments in (("-n", str(suite.gpus + suite.cpus)), ("-n0",), suite.ours):
            done = subprocess.run(
                [*PYTEST, *arguments], cwd=path, env=place.environment, capture_output=True,
                text=True, timeout=120,
            )  # fmt: skip
            if done.returncode not in (0, 1):
                wrong.append(f"exit code {done.returncode}: {done.stdout[-1000:]}")
            found.append(Happened(path))
        return len(found[0].outcomes), wrong + differences(*found)


def main() -> None:
    """Print what was wrong with each suite; exit code 1 where anything was.

    The seeds done are told on stderr, as they come.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("suites", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    tests = bad = 0
    with scene() as place:
        for seed in range(arguments.first, arguments.first + arguments.suites):
            count, wrong = run(seed, place)
            tests += count
            bad += bool(wrong)
            for text in wrong:
                print(f"{seed}: {text}", flush=True)
            print(f"{seed}: {count} tests", file=sys.stderr, flush=True)
    print(f"{arguments.suites} suites, {tests} tests, {bad} suites with a difference")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
