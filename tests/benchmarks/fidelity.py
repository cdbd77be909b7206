"""Random projects, run under the own scheduler and by stock xdist, and what differs.

`python -m tests.benchmarks.fidelity 500 --first 1000`: a few seconds for each. Each seed is printed
with its differences; those with any are kept in a file, and run again with `--kept`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from .scene import scene

from fidelity.random_runs import compare  # isort: skip - scene sets the path


def main() -> None:
    """Print what differs; exit code 1 where anything does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cases", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds only")
    parser.add_argument("--keep", type=Path, help="a JSON file for the seeds with a difference")
    parser.add_argument("--kept", action="store_true", help="run the seeds of that file")
    parser.add_argument("--replay", action="store_true", help="run each worker's tests by stock")
    options = parser.parse_args()
    seeds = options.seeds or range(options.first, options.first + options.cases)
    if options.kept:
        seeds = json.loads(options.keep.read_text())
    bad: list[int] = []
    own = tests = 0
    setups = {fits: (Counter[str](), Counter[str]()) for fits in (True, False)}
    start = time.monotonic()
    with scene() as place:
        for seed in seeds:
            with tempfile.TemporaryDirectory(dir=place.path.parent) as directory:
                case = Path(directory) / "case"
                done = compare(seed, case, place.environment, always_replay=options.replay)
            own += done.ours.own_scheduler
            tests += len(done.ours.begun)
            compares = done.case.workers > 1 and not done.case.cut_short and done.stock_setups
            if compares and done.ours.own_scheduler:
                for total, each in zip(
                    setups[done.case.fits], (done.ours.setups, done.stock_setups), strict=True
                ):
                    total.update(each)
            print(f"{done.case}: {len(done.ours.begun)} tests, exit code {done.ours.code}")
            for text in done.found:
                print("  -", text.replace("\n", "\n  "), flush=True)
            if done.found:
                bad.append(seed)
                if options.keep:
                    options.keep.write_text(json.dumps(bad))
    print(
        f"{len(seeds)} projects, {own} under the own scheduler, {tests} tests, "
        f"{time.monotonic() - start:.0f} s: {len(bad)} with a difference {bad}"
    )
    for fits, (mine, stock) in setups.items():
        which = "all needs fit at once" if fits else "they do not"
        print(f"set-ups by scope where {which}, ours and the largest of up to five stock runs:")
        for scope in ("session", "package", "module", "class", "function"):
            print(f"  {scope}: {mine[scope]}, {stock[scope]}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
