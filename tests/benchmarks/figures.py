"""Random runs whose true history of VRAM is known, and what their reports say of it.

`python -m tests.benchmarks.figures 300 --first 1000`: about 4 seconds for each run. Printed is
what was wrong, and at the end how many figures of each kind were compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .scene import scene

from histories.checking import check_seed, in_words  # isort: skip - scene sets the path
from simulator import build  # isort: skip


def main() -> None:
    """Print what was wrong with each run; exit code 1 where anything was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", type=Path, help="a folder for the output of runs that are wrong")
    arguments = parser.parse_args()
    figures: Counter[str] = Counter()
    bad = 0
    with scene() as place, tempfile.TemporaryDirectory() as directory:
        library = build(Path(directory, "nvml")).parent
        environment = {**place.environment}
        for seed in range(arguments.first, arguments.first + arguments.runs):
            checked = check_seed(seed, Path(directory, str(seed)), library, environment)
            figures.update(checked.figures)
            bad += bool(checked.wrong)
            for text in in_words(checked):
                print(text, flush=True)
            if checked.wrong and arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{seed}.txt").write_text(checked.output)
            print(f"{seed}: {sum(checked.figures.values())} figures", file=sys.stderr, flush=True)
    for kind, count in sorted(figures.items()):
        print(f"{count:6} {kind}")
    print(f"{arguments.runs} runs, {bad} with a wrong figure")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
