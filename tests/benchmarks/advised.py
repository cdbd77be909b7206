"""Random machines on which a suite runs and each suggestion is followed: is its promise kept?

`python -m tests.benchmarks.advised 100 --first 1000`: 2 to 8 seconds for each machine. Printed is
what was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .scene import scene

from histories.advised import follow  # isort: skip - scene sets the path
from simulator import build  # isort: skip


def main() -> None:
    """Print each promise that was not kept; exit code 1 where there is one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("machines", type=int, nargs="?", default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    hints = bad = lacked = 0
    with scene() as place, tempfile.TemporaryDirectory() as directory:
        library = build(Path(directory, "nvml")).parent
        environment = {**place.environment, "OLLAMA_HOST": "127.0.0.1:9"}
        for seed in range(arguments.first, arguments.first + arguments.machines):
            found = follow(seed, Path(directory, str(seed)), library, environment)
            hints += len(found.hints)
            lacked += found.lacked
            bad += bool(found.wrong)
            for text in found.wrong:
                print(f"{seed}: {text}", flush=True)
            print(f"{seed}: {len(found.hints)} suggestions", file=sys.stderr, flush=True)
    print(
        f"{arguments.machines} machines, {hints} suggestions followed, {lacked} runs that lacked "
        f"VRAM, {bad} machines with a promise not kept"
    )
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
