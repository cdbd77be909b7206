"""Random suites of tests that use models, GPU tests and others, with real processes.

`python -m tests.benchmarks.llm_suites 200 --first 1000 --seconds 200`: about 4 seconds for each.
The test suite runs ten of them. A line for each suite: its seed, and what was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .scene import build

from dispatching.llm_suites import LlmSuite  # isort: skip - scene sets the path


def main() -> int:
    """Print what was wrong with each suite; exit code 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no suite after these")
    options = parser.parse_args()
    began, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as directory:
        library = build(Path(directory)).parent
        for seed in range(options.first, options.first + options.count):
            if time.monotonic() - began > options.seconds:
                break
            with tempfile.TemporaryDirectory() as place:
                found = LlmSuite(seed).check(Path(place), library)
            wrong += bool(found.wrong)
            print(f"{seed}: {found.tests} tests, {found.loads} loads", *found.wrong, sep="\n  ")
            sys.stdout.flush()
    print(f"{wrong} suites wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
