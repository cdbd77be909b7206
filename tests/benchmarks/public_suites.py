"""Public test suites under the own scheduler and under stock xdist: the same outcomes.

`python -m tests.benchmarks.public_suites DIR...`: unpacked source distributions, whose
packages and test dependencies are installed. Every test has a need; `--strict` makes warnings
errors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from .scene import scene

from fidelity.compare import within  # isort: skip - scene sets the path
from fidelity.runs import NEEDS, OURS, Run, run  # isort: skip


def main() -> None:
    """Print what differs; exit code 1 where anything does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one run")
    options = parser.parse_args()
    bad = 0
    with scene() as here, tempfile.TemporaryDirectory() as directory:
        for project in options.directories:
            arguments = ["-n", str(options.workers), "-p", "no:cacheprovider", "-q"]
            if options.strict:
                arguments += ["-W", "error"]

            def one(
                where: str, *more: str, project: Path = project, shared: list[str] = arguments
            ) -> Run:
                place = Path(directory) / where
                return run(
                    project.resolve(), place, [*shared, *more], here.environment,
                    timeout=options.limit,
                )  # fmt: skip

            start = time.monotonic()
            ours = one("ours", *OURS, *NEEDS)
            found = within(lambda one=one: one("stock"), ours, most=3)
            if not ours.own_scheduler:
                found.append(f"the own scheduler was not in charge: {ours.out[-500:]}")
            bad += bool(found)
            print(
                f"{project.name}: {len(ours.begun)} tests, exit code {ours.code}, "
                f"{'differs' if found else 'the same'}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            for text in found[:40]:
                print("  -", text[:400], flush=True)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
