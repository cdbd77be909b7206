"""What a lease costs: alone, contended, beside other sessions, and when a holder is killed.

    python -m tests.benchmarks.leases [--processes 8] [--rounds 40] [--pairs 0]

A device of 24 GB without NVML: the ledger's own cost. Contended: each of the processes leases
12 GB for 10 ms again and again; a wait less the time in which others held the VRAM is what the
ledger adds. With reslock installed (`pip install reslock==0.12.3`) the same is done with it.
`--pairs` times so many pairs of runs instead, with leases and without, and nobody beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.leases.ledger import Ledger
from pytest_gpushare.leases.lessee import Lessee, View, Wish
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.units import GB
from tests.simulator.child import child_process

from .pairs import HEAD, compare
from .scene import PYTEST, TRIVIAL, scene

TOTAL, SIZE, HOLD = 24 * GB, 12 * GB, 0.01
UUID = "GPU-0"


class Nvml:
    """Readings that take as long as a driver's, with nothing in use."""

    def memory(self) -> dict[str, Memory]:
        return {UUID: Memory(TOTAL, 0, TOTAL)}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        time.sleep(0.0045)
        return {UUID: ()}


def lessee(directory: Path, *, nvml: bool = False) -> Lessee:
    record = LeaseRecord(os.getpid(), root="/srv/project", began=time.time())
    return Lessee(Ledger(directory), record, {UUID: TOTAL}, Nvml() if nvml else None)


def decide(view: View) -> Wish:
    claims = view.claims[UUID]
    room = TOTAL - claims.leased
    fits = room - claims.ahead(room, view.ticket) >= SIZE
    return Wish({UUID: DeviceLease(SIZE, 0) if fits else DeviceLease(0, SIZE)}, is_explained=True)


def acquire(mine: Lessee) -> None:
    assert mine.claim(decide, 60.0, lambda *_: None).is_granted


def release(mine: Lessee) -> None:
    mine.change(devices={})


def pairs(mine: Lessee, count: int) -> list[float]:
    """Seconds of each acquire and release together."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        acquire(mine)
        release(mine)
        took.append(time.perf_counter() - began)
    return took


class Reslock:
    """The same device, as the library reslock shares it."""

    def __init__(self, directory: Path) -> None:
        import reslock

        directory.mkdir(exist_ok=True)
        self._pool = reslock.ResourcePool(directory / "state.json")
        self._pool.set_resources({"vram_mb": TOTAL >> 20})

    def hold(self) -> contextlib.AbstractContextManager[object]:
        held: contextlib.AbstractContextManager[object] = self._pool.acquire(vram_mb=SIZE >> 20)
        return held


def contend_by_reslock(directory: Path, rounds: int, until: float) -> list[list[float]]:
    """The same rows."""
    pool, found = Reslock(directory), []
    time.sleep(max(0.0, until - time.monotonic()))
    for _ in range(rounds):
        asked = time.monotonic()
        with pool.hold():
            got = time.monotonic()
            time.sleep(HOLD)
            found.append([asked, got, time.monotonic()])
    return found


def contend(directory: Path, rounds: int, until: float) -> list[list[float]]:
    """[asked, got, released] of each round, on the monotonic clock."""
    mine, found = lessee(directory), []
    time.sleep(max(0.0, until - time.monotonic()))
    for _ in range(rounds):
        asked = time.monotonic()
        acquire(mine)
        got = time.monotonic()
        time.sleep(HOLD)
        found.append([asked, got, time.monotonic()])
        release(mine)
    mine.close()
    return found


def crowd(
    directory: Path, processes: int, rounds: int, child: str = "--child"
) -> list[list[float]]:
    until = time.monotonic() + 2 + 0.3 * processes
    command = [sys.executable, "-m", "tests.benchmarks.leases", child, str(directory),
               str(rounds), str(until)]  # fmt: skip
    with ExitStack() as stack:
        started = [
            stack.enter_context(child_process(command, stdout=subprocess.PIPE, text=True))
            for _ in range(processes)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in started]
    return [row for output in outputs for row in json.loads(output)]


def added(rows: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each wait in which less than all of the device was held: the lock's own share."""
    steps = sorted([(got, 1) for _, got, _ in rows] + [(end, -1) for _, _, end in rows])
    full: list[tuple[float, float]] = []
    held, since = 0, 0.0
    for at, step in steps:
        if held == 2 and step < 0:
            full.append((since, at))
        held += step
        if held == 2:
            since = at
    return [
        max(0.0, got - asked - sum(max(0.0, min(got, b) - max(asked, a)) for a, b in full))
        for asked, got, _ in rows
    ]


def most_at_once(rows: Sequence[Sequence[float]]) -> int:
    steps = sorted([(got, 1) for _, got, _ in rows] + [(end, -1) for _, _, end in rows])
    held = most = 0
    for _, step in steps:
        held += step
        most = max(most, held)
    return most


def overtakings(rows: Sequence[Sequence[float]]) -> int:
    """Pairs of which one asked at least 5 ms later and got its VRAM first."""
    return sum(b[0] > a[0] + 0.005 and b[1] < a[1] for a in rows for b in rows if b[0] < a[1])


def killed(directory: Path) -> float:
    """Seconds from the SIGKILL of a holder of everything to the grant of a waiter."""
    code = (
        "import sys, time; from pathlib import Path; from tests.benchmarks import leases as b; "
        "m = b.lessee(Path(sys.argv[1])); b.acquire(m); m.change(devices={b.UUID: "
        "b.DeviceLease(b.TOTAL)}); print('held', flush=True); time.sleep(60)"
    )
    with child_process(
        [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        moment = 0.0

        def report(view: View, waited: float) -> None:
            nonlocal moment
            if waited > 1 and not moment:
                moment = time.monotonic()
                os.kill(holder.pid, signal.SIGKILL)

        mine = lessee(directory)
        assert mine.claim(decide, 60.0, report).is_granted
        took = time.monotonic() - moment
        mine.close()
        return took


DECLARED = """
import pytest

@pytest.mark.parametrize("i", range(2000))
@pytest.mark.gpu(vram="2GB")
def test_declared(i):
    pass
"""


def runs_alone(pairs: int) -> None:
    """One session with leases and without: its start, and the dispatch of many short tests."""
    print(HEAD)
    for name, module in (("start, 10 tests", TRIVIAL), ("2,000 tests with needs", DECLARED)):
        with scene(module) as here:
            here.environment["PYTEST_GPUSHARE_LEASES"] = str(here.path.parent / "leases")
            run = (*PYTEST, "--gpu-share", "-o", "gpu_share_preset=no-ollama packed", "-n2")
            without = (*run, "-o", "gpu_share_leases=off")
            ratio = compare(run, without, here.path, here.environment, pairs)
            print(ratio.row(f"{name}: leases / gpu_share_leases=off"), flush=True)


def shown(name: str, values: Sequence[float]) -> None:
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    median = statistics.median(values)
    print(f"{name:52} median {median * 1e3:9.3f} ms   p99 {p99 * 1e3:9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--reslock", nargs=3)
    options = parser.parse_args()
    for child, take_part in ((options.child, contend), (options.reslock, contend_by_reslock)):
        if child:
            directory, rounds, until = child
            print(json.dumps(take_part(Path(directory), int(rounds), float(until))))
            return
    if options.pairs:
        runs_alone(options.pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, nvml in (("", False), (", process list 4.5 ms", True)):
            mine = lessee(Path(folder, f"alone{nvml}"), nvml=nvml)
            shown(f"acquire + release, alone{name}", pairs(mine, 1000))
            other = lessee(Path(folder, f"alone{nvml}"))
            other.change(devices={UUID: DeviceLease(GB)})
            shown(f"acquire + release, one other session{name}", pairs(mine, 200))
        several = [lessee(Path(folder, "many")) for _ in range(64)]
        for each in several:
            each.change(devices={UUID: DeviceLease(1024)})
        shown("acquire + release, 64 other sessions", pairs(lessee(Path(folder, "many")), 200))
        shown(
            "SIGKILL of the holder to the grant",
            [killed(Path(folder, f"kill{n}")) for n in range(5)],
        )
        rows = crowd(Path(folder, "crowd"), options.processes, options.rounds)
        shown_together("contended", rows, options.processes * options.rounds)
        if importlib.util.find_spec("reslock") is None:
            print("reslock is not installed")
            return
        pool, took = Reslock(Path(folder, "reslock-alone")), []
        for _ in range(200):
            began = time.perf_counter()
            with pool.hold():
                pass
            took.append(time.perf_counter() - began)
        shown("reslock: acquire + release, alone", took)
        few = max(1, options.rounds // 4)
        rows = crowd(Path(folder, "reslock"), options.processes, few, "--reslock")
        shown_together("reslock, contended", rows, options.processes * few)


def shown_together(name: str, rows: Sequence[Sequence[float]], count: int) -> None:
    """What it was like for all of them: `count` times two of them could hold their half."""
    shown(f"{name}: wait", [got - asked for asked, got, _ in rows])
    shown(f"{name}: wait without the others' holds", added(rows))
    span = max(row[2] for row in rows) - min(row[0] for row in rows)
    print(
        f"{name}: {span / (count * HOLD / 2):.2f} of the ideal time, at most "
        f"{most_at_once(rows)} of 2 at once, {overtakings(rows)} overtakings"
    )


if __name__ == "__main__":
    main()
