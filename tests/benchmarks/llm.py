"""Tests that use models of Ollama's: as collected, grouped, and phased, against a bound.

    python -m tests.benchmarks.llm [--ways stock grouped phased] [--scale 10]

24 GB; 3 models of 10 GB, 8 s a load; 60 tests of them and 100 GPU tests of 4 GB, 1 to 5 s each, in
the order of a fixed seed; 4 GPU workers. Times are scaled down, and reported scaled up again. A
way's time is from the first test's start to the last one's end. The bound is what a discrete-event
simulation gives for the best of many orders, without any cost of starting, asking or reporting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.simulator import Device, Machine, build
from tests.simulator.ollama import Model, OllamaServer

ROOT = Path(__file__).parents[2]
MODELS = ("a:10b", "b:10b", "c:10b")
LOAD, MODEL_GB, TEST_GB, BUDGET_GB, WORKERS = 8.0, 10.0, 4.0, 22.0, 4

SUITE = """
import json, os, time, urllib.request
import pytest
import gpusim

TESTS = json.load(open("tests.json"))

def note(began):
    with open("times.txt", "a") as file:
        file.write(f"{began} {time.time()}\\n")

def ask(model, seconds):
    body = {"model": model, "prompt": f"take {seconds:.3f} s", "stream": False}
    url = "http://" + os.environ["OLLAMA_HOST"] + "/api/generate"
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()

def marked(number, test):
    marks = [pytest.mark.gpu(vram="4GB")] if test["gpu"] else []
    return pytest.param(test, marks=marks, id=f"{test['model'] or 'gpu'}-{number}")

@pytest.mark.parametrize("test", [marked(n, t) for n, t in enumerate(TESTS)])
def test_it(test):
    began = time.time()
    if test["gpu"]:
        with gpusim.alloc("3.3GB"):
            time.sleep(test["seconds"])
    else:
        ask(test["model"], test["seconds"])
    note(began)
"""

RULES = "".join(f"\n    test_workload.py::test_it[{name}-* = {name}" for name in MODELS)


class Test(NamedTuple):
    """One test of the workload; seconds are not scaled."""

    model: str
    seconds: float


def workload(seed: int = 19) -> list[Test]:
    """The tests in the order of collection."""
    draw = Random(seed)
    tests = [Test(MODELS[n % 3], draw.uniform(1, 5)) for n in range(60)]
    tests += [Test("", draw.uniform(1, 5)) for _ in range(100)]
    draw.shuffle(tests)
    return tests


def bound(tests: Sequence[Test], tries: int = 200) -> float:
    """Seconds of the best order that was found: one request at a time for each model, one model
    after another, GPU tests in what is left beside it, no more tests than workers."""
    draw, best = Random(1), float("inf")
    gpu = sorted((test.seconds for test in tests if not test.model), reverse=True)
    for number in range(tries):
        order = list(gpu)
        if number:
            order.sort(key=lambda seconds: -seconds * draw.uniform(0.7, 1.3))
        chain: list[tuple[str, float]] = []
        names = list(MODELS)
        draw.shuffle(names)
        for name in names:
            chain.append(("load", LOAD))
            chain += [("test", t.seconds) for t in tests if t.model == name]
        best = min(best, _simulated(order, chain))
    return best


def _simulated(gpu: list[float], chain: list[tuple[str, float]]) -> float:
    events: list[tuple[float, str]] = []
    now, held, busy, chain_at = 0.0, 0, 0, 0
    waiting = gpu[::-1]
    is_chain_busy = False
    while True:
        if not is_chain_busy and chain_at < len(chain):
            kind, seconds = chain[chain_at]
            if kind == "load" or busy < WORKERS:
                heappush(events, (now + seconds, f"chain {kind}"))
                is_chain_busy, busy = True, busy + (kind == "test")
                chain_at += 1
        is_loaded = chain_at < len(chain) or is_chain_busy
        most = int((BUDGET_GB - (MODEL_GB + 1.0 if is_loaded else 0.0)) // TEST_GB)
        while waiting and held < most and busy < WORKERS:
            heappush(events, (now + waiting.pop(), "gpu"))
            held, busy = held + 1, busy + 1
        if not events:
            return now
        now, what = heappop(events)
        if what == "gpu":
            held, busy = held - 1, busy - 1
        else:
            is_chain_busy, busy = False, busy - what.endswith("test")


class Result(NamedTuple):
    """What one way took."""

    seconds: float
    loads: int
    spills: int
    passed: int


def run(way: str, tests: Sequence[Test], scale: float) -> Result:
    """Run the workload with real workers and the simulated server."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        shown = [
            {"model": t.model, "gpu": not t.model, "seconds": t.seconds / scale} for t in tests
        ]
        (path / "tests.json").write_text(json.dumps(shown), encoding="utf-8")
        (path / "test_workload.py").write_text(SUITE, encoding="utf-8")
        (path / "pytest.ini").write_text(_ini(way), encoding="utf-8")
        machine = Machine.create(path / "vram", [Device(total="24GB", used="1GB")])
        library = build(path).parent
        models = {model: {"size": f"{MODEL_GB:g}GB"} for model in MODELS}
        with OllamaServer(
            machine,
            [Model(name, **fields) for name, fields in models.items()],
            max_loaded=1,
            load_delay=LOAD / scale,
        ) as server:
            environment = {
                **os.environ,
                **machine.env(library),
                "OLLAMA_HOST": server.host,
                "PYTEST_XDIST_AUTO_NUM_WORKERS": "64",
                "PYTEST_GPUSHARE_LEASES": str(path / "leases"),
            }
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly"]
            command += ["-n4"] if way == "stock" else ["--gpu-share"]
            done = subprocess.run(
                command, cwd=path, env=environment, capture_output=True, text=True, timeout=900
            )
            times = [
                tuple(map(float, line.split()))
                for line in (path / "times.txt").read_text(encoding="utf-8").splitlines()
            ]
            passed = len(times)
            span = max(end for _, end in times) - min(began for began, _ in times)
            if way != "stock" and passed < len(tests):
                print(done.stdout[-4000:], done.stderr[-1000:])
            scheduler = server.scheduler
            return Result(span * scale, len(scheduler.loads), len(scheduler.spills), passed)


def _ini(way: str) -> str:
    if way == "stock":
        return "[pytest]\nmarkers = gpu\n"
    reservation = "11264" if way == "grouped" else "auto"
    phase = "beside" if way == "grouped" else "auto"
    return (
        "[pytest]\n"
        f"gpu_share_ollama_vram_reservation_mb = {reservation}\n"
        f"gpu_share_ollama_models = {' '.join(MODELS)}\n"
        f"gpu_share_ollama_phase = {phase}\n"
        "gpu_share_ollama_context = 4096\n"
        "gpu_share_max_workers_per_gpu = 4\n"
        "gpu_share_max_workers_per_gb = 0\n"
        "gpu_share_min_vram_per_worker_gb = 2.5\n"
        f"gpu_share_ollama_tests ={RULES}\n"
    )


def main() -> int:
    """Print a line for each way, and how far `phased` is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", default=["stock", "grouped", "phased"])
    parser.add_argument("--scale", type=float, default=10.0)
    options = parser.parse_args()
    tests = workload()
    least = bound(tests)
    print(f"bound: {least:.0f} s")
    ratio = 0.0
    for way in options.ways:
        result = run(way, tests, options.scale)
        ratio = result.seconds / least
        print(
            f"{way}: {result.seconds:.0f} s = {ratio:.2f} x bound, {result.loads} loads, "
            f"{result.spills} spills, {result.passed} of {len(tests)} passed",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
