"""What a decision costs, and how close to the bound the order comes, without any process.

    python -m tests.benchmarks.packing_scale [WORKLOAD.json]

Prints Markdown tables: time per test for 1,000, 10,000 and 100,000 tests on 16 devices with 64
workers, planned and dispatched by a simulated clock; and the makespan of workloads against
the lower bound, with known durations and without. WORKLOAD.json is a list of [GB, seconds].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from heapq import heappop, heappush
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
from dispatching import makespan_by_bound

from pytest_gpushare.scheduler.dispatcher import Dispatcher
from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import Admit, DeviceCapacity, DeviceReading, Job, Run, Worker
from pytest_gpushare.units import GB

DEVICES, WORKERS = 16, 64
LIKE_IT = (1, 1, 1, 2, 2, 2, 3, 4, 4, 6, 6, 8, 8, 12)


def clock_cost() -> float:
    """Seconds of CPU that reading the clock adds to what is measured between two readings."""
    spent = 0.0
    for _ in range(20_000):
        before = time.process_time()
        spent += time.process_time() - before
    return spent / 20_000


def dispatched(count: int, *, known: bool, different: bool) -> float:
    """Seconds of CPU that planning and dispatching so many tests takes.

    Neither the simulated clock nor the readings of the real one count: there is a pair of these
    for each test.
    """
    draw = Random(count)
    needs = [draw.randrange(GB, 12 * GB) if different else draw.choice(LIKE_IT) * GB
             for _ in range(count)]  # fmt: skip
    durations = [draw.uniform(0.2, 2.0) for _ in range(count)]
    jobs = [
        Job(f"t{i}", True, Need(needs[i], source="marker"), "", durations[i] if known else None)
        for i in range(count)
    ]
    rooms = [DeviceCapacity(f"GPU-{n}", f"GPU {n}", 24 * GB) for n in range(DEVICES)]
    reading = {room.uuid: DeviceReading(80 * GB) for room in rooms}
    spent = 0.0
    before = time.process_time()
    dispatcher = Dispatcher(jobs, rooms)
    for n in range(WORKERS):
        dispatcher.worker_up(Worker(f"gw{n}", (f"GPU-{n % DEVICES}",), 3 * GB))
    actions = dispatcher.step(reading, 0.0)
    spent += time.process_time() - before
    running: list[tuple[float, str, int]] = []
    now = 0.0
    done = 0
    while True:
        for action in actions:
            if isinstance(action, Admit):
                started = action.test
            elif isinstance(action, Run) and action.admitted:
                (started,) = action.tests
            else:
                continue
            heappush(running, (now + durations[started], action.worker, started))
        if not running:
            break
        now, worker, test = heappop(running)
        before = time.process_time()
        dispatcher.finished(worker, test, {}, 1.0)
        actions = dispatcher.step(reading, now)
        spent += time.process_time() - before
        done += 1
    assert done == count
    assert dispatcher.is_done
    return spent - count * clock_cost()


def random_workload(seed: int) -> list[tuple[float, float]]:
    """40 tests as (GB, seconds)."""
    draw = Random(seed)
    return [(draw.choice(LIKE_IT), draw.uniform(0.25, 1.95)) for _ in range(40)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workload", type=Path, nargs="?", help="a list of [GB, seconds]")
    path = parser.parse_args().workload
    print("| tests | needs | durations | µs of CPU per test |")
    print("| --- | --- | --- | --- |")
    for count in (1_000, 10_000, 100_000):
        for different, known in ((False, True), (True, True), (True, False)):
            spent = dispatched(count, known=known, different=different)
            print(
                f"| {count:,} | {'all different' if different else '8 sizes'} "
                f"| {'known' if known else 'unknown'} | {spent / count * 1e6:.1f} |",
                flush=True,
            )
    workloads = {f"random {seed}": random_workload(seed) for seed in range(40)}
    print("\n| workload | durations | makespan ÷ bound: median | largest |")
    print("| --- | --- | --- | --- |")
    if path is not None:
        own = [(size, seconds) for size, seconds in json.loads(path.read_text())]
        for known in (True, False):
            found = makespan_by_bound(own, known=known)
            print(f"| {path.name} | {'known' if known else 'unknown'} | {found:.3f} | |")
    for known in (True, False):
        ratios = [makespan_by_bound(pairs, known=known) for pairs in workloads.values()]
        print(
            f"| 40 random ones like it | {'known' if known else 'unknown'} "
            f"| {statistics.median(ratios):.3f} | {max(ratios):.3f} |"
        )


if __name__ == "__main__":
    main()
