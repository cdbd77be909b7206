"""A workload of [GB, seconds], run in miniature: how near its makespan comes to the bound."""

from __future__ import annotations

from dispatching.world import Script, World

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.packing import Bin, lower_bound
from pytest_gpushare.scheduler.types import DeviceCapacity, Job, Worker
from pytest_gpushare.units import GB


def makespan_by_bound(pairs: list[tuple[float, float]], *, known: bool) -> float:
    """Of 8 workers on one device of 24 GB, as the dispatcher runs them, ÷ the lower bound.

    `known`: whether the durations are. Nothing may go wrong on the way.
    """
    needs = [int(size * GB) for size, _ in pairs]
    durations = [seconds for _, seconds in pairs]
    jobs = [
        Job(f"t{i}", True, Need(need, source="marker"), "", durations[i] if known else None)
        for i, need in enumerate(needs)
    ]
    world = World(
        jobs,
        [DeviceCapacity("GPU-0", "GPU 0", 24 * GB)],
        [Worker(f"gw{n}", ("GPU-0",), 3 * GB) for n in range(8)],
        scripts={i: Script(seconds) for i, seconds in enumerate(durations)},
    ).run()
    assert world.wrong == []
    return world.makespan / lower_bound(needs, durations, [Bin(24 * GB, 8)])
