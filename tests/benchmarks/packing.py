"""How well tests with needs are packed: a workload on the simulated device, beside what others do.

    python -m tests.benchmarks.packing [WORKLOAD.json] [--runs 5] [--timing DIRECTORY]

WORKLOAD.json is a list of [GB, seconds]; without it, a random workload of 40 tests is run. Eight
workers, one device of 24 GB, nothing kept for Ollama, no safety buffer, contexts free of charge.
Each test holds its VRAM while it sleeps; the makespan is that from the first start to the last
end. Compared are

- this plugin, with durations of an earlier run and without;
- xdist alone, with 8 workers and with 2;
- pytest-timing 0.4 with as many "CPUs" as GB, if DIRECTORY has it (`pip install --target`);
- CTest, if it is there, with the same needs as resources, with and without its own history.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pytest_gpushare.scheduler.packing import Bin, lower_bound

from .packing_scale import random_workload
from .scene import Scene, scene

GIB, WORKERS = 24, 8
OURS = (
    "--gpu-share", "--gpu-share-preset=no-ollama", "--gpu-share-preset=packed",
    "-o", "gpu_share_safety_buffer_mb=0",
)  # fmt: skip
SUITE = """
import os, time, gpusim, pytest

WORKLOAD = {workload}

@pytest.mark.parametrize("number", [
    pytest.param(n, marks=[pytest.mark.gpu(vram=f"{{gb}}GB"), pytest.mark.timing_cpu(gb)])
    for n, (gb, _) in enumerate(WORKLOAD)
])
def test_model(number):
    gb, seconds = WORKLOAD[number]
    start = time.time_ns()
    try:
        with gpusim.alloc(f"{{gb}}GB"):
            time.sleep(seconds)
    finally:
        with open(os.environ["BENCHMARK_LOG"], "a") as log:
            log.write(f"{{start}} {{time.time_ns()}}\\n")
"""


class Run(NamedTuple):
    """What came of one run."""

    makespan: float
    failed: int
    whole: float
    """Seconds of the whole command."""


def run(here: Scene, command: list[str], tests: int) -> Run:
    """Run the command; each of its tests writes its start and end into the log."""
    log = here.path / "log.txt"
    log.unlink(missing_ok=True)
    before = time.monotonic()
    done = subprocess.run(
        command,
        cwd=here.path,
        env={**here.environment, "BENCHMARK_LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    whole = time.monotonic() - before
    times = [[int(word) for word in line.split()] for line in log.read_text().splitlines()]
    assert len(times) == tests, f"{len(times)} tests: {done.stdout[-3000:]}{done.stderr[-2000:]}"
    span = (max(end for _, end in times) - min(start for start, _ in times)) / 1e9
    failed = re.search(r"(\d+) failed", done.stdout)
    return Run(span, int(failed[1]) if failed else 0, whole)


def pytest_with(*arguments: str) -> list[str]:
    """A run of pytest in the scene."""
    return [
        sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:hypothesispytest",
        *arguments,
    ]  # fmt: skip


def of_ctest(here: Scene, workload: list[tuple[float, float]]) -> list[str]:
    """The same tests and needs for CTest: resources in units of a GB."""
    build = here.path / "ctest"
    build.mkdir(exist_ok=True)
    lines = []
    for number, (gb, seconds) in enumerate(workload):
        script = build / f"t{number}.sh"
        script.write_text(
            f's=$(date +%s%N); sleep {seconds}; echo "$s $(date +%s%N)" >> "$BENCHMARK_LOG"\n'
        )
        lines.append(f'add_test(t{number} "sh" "{script}")')
        lines.append(f'set_tests_properties(t{number} PROPERTIES RESOURCE_GROUPS "1,gb:{int(gb)}")')
    (build / "CTestTestfile.cmake").write_text("\n".join(lines))
    spec = {"version": {"major": 1, "minor": 0}, "local": [{"gb": [{"id": "0", "slots": GIB}]}]}
    (build / "spec.json").write_text(json.dumps(spec))
    return [
        "ctest", "--test-dir", str(build), "-j", str(WORKERS),
        "--resource-spec-file", str(build / "spec.json"),
    ]  # fmt: skip


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timing", type=Path, help="where pytest-timing 0.4 is installed")
    options = parser.parse_args()
    workload = random_workload(0)
    if options.workload is not None:
        workload = [(gb, seconds) for gb, seconds in json.loads(options.workload.read_text())]
    bound = lower_bound(
        [int(gb * 1024) for gb, _ in workload], [s for _, s in workload], [Bin(GIB * 1024, WORKERS)]
    )
    print(f"{len(workload)} tests, bound {bound:.2f} s, {options.runs} runs each\n")
    print("| how | median makespan | ÷ bound | range | failed tests, median | whole command |")
    print("| --- | --- | --- | --- | --- | --- |")
    with scene(SUITE.format(workload=workload), used="0MB", context="0MB") as here:

        def measure(name: str, command: list[str], prepare: Callable[[], None], warm: bool) -> None:
            prepare()
            if warm:
                run(here, command, len(workload))
            found = []
            for _ in range(options.runs):
                if not warm:
                    prepare()
                found.append(run(here, command, len(workload)))
            spans = sorted(one.makespan for one in found)
            median = statistics.median(spans)
            print(
                f"| {name} | {median:.2f} s | {median / bound:.3f} "
                f"| {spans[0]:.2f} to {spans[-1]:.2f} s "
                f"| {statistics.median(one.failed for one in found):.0f} "
                f"| {statistics.median(one.whole for one in found):.1f} s |",
                flush=True,
            )

        def forget() -> None:
            shutil.rmtree(here.path / ".pytest_cache", ignore_errors=True)
            shutil.rmtree(here.path / "ctest" / "Testing", ignore_errors=True)

        ours = pytest_with("-n", str(WORKERS), *OURS)
        measure("needs declared, durations learned", ours, forget, True)
        measure("needs declared, no durations", ours, forget, False)
        highest = here.machine.snapshot()[0].peak_used
        measure("xdist `-n 8`", pytest_with("-n", "8"), forget, False)
        measure("xdist `-n 2`", pytest_with("-n", "2"), forget, False)
        if options.timing is not None:
            here.environment["PYTHONPATH"] = (
                f"{options.timing}:{here.environment.get('PYTHONPATH', '')}"
            )
            timing = pytest_with("-n", str(WORKERS), "--timing-cpus", str(GIB))
            measure("pytest-timing 0.4, with history", timing, forget, True)
            measure("pytest-timing 0.4, without", timing, forget, False)
        if shutil.which("ctest"):
            command = of_ctest(here, workload)
            measure("CTest, with history", command, forget, True)
            measure("CTest, without", command, forget, False)
    print(f"\nThe most that was in use under the plugin: {highest / 1024**3:.2f} GB")


if __name__ == "__main__":
    main()
