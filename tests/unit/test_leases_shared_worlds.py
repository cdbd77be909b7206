"""Sessions that lease by the test: they all end, and none takes what is another's."""

from __future__ import annotations

from random import Random

import pytest
from dispatching.sessions import Host, Session
from dispatching.world import Device, Script

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import DeviceCapacity, Job, Worker

CONTEXT = 1


def host(total: int = 24, devices: int = 1) -> Host:
    return Host({f"GPU-{number}": Device(total) for number in range(devices)})


def session(
    at: Host,
    needs: list[int],
    workers: int = 2,
    *,
    keeps: int = 0,
    duration: float = 1.0,
    several: bool = False,
    by_pid: bool = True,
) -> Session:
    rooms = [
        DeviceCapacity(uuid, uuid, device.total, free=device.total, context=CONTEXT)
        for uuid, device in at.devices.items()
    ]
    uuids = [room.uuid for room in rooms]
    placed = [
        Worker(f"gw{n}", (uuids[n % len(uuids)], *(u for u in uuids if u != uuids[n % len(uuids)])),
               max(needs))
        for n in range(workers)
    ]  # fmt: skip
    jobs = [
        Job(
            f"test_{number}",
            True,
            Need(need, source="marker", devices=1 + (several and number % 3 == 0)),
        )
        for number, need in enumerate(needs)
    ]
    scripts = {n: Script(duration, keeps=min(keeps, needs[n] - CONTEXT)) for n in range(len(needs))}
    return Session(at, len(at.sessions), jobs, rooms, placed, scripts, by_pid=by_pid)


def assert_well(at: Host) -> None:
    for each in at.sessions:
        assert each.wrong == []
        assert each.out_of_memory == 0
        assert all(outcomes == ["done"] for outcomes in each.outcomes.values())
        assert len(each.outcomes) == len(each.jobs)
    assert at.wrong == []


def test_newcomer_gets_what_its_largest_test_needs() -> None:
    """Without a worker of the first session being stopped, and long before that one ends."""
    at = host()
    first = session(at, [8] * 30, 3)
    second = session(at, [10] * 3, 1)
    at.run(starts=[0.0, 2.5])
    assert_well(at)
    start, *_ = second.admitted[0]
    assert start < 5.0
    assert second.last < 8
    assert not first.tells("worker-ended")


def test_two_sessions_that_fit_run_at_once() -> None:
    at = host()
    first, second = session(at, [5] * 20, 2), session(at, [5] * 20, 2)
    at.run()
    assert_well(at)
    assert max(first.last, second.last) < 14


def test_one_test_left_holds_no_more_than_it_needs() -> None:
    at = host()
    session(at, [4, 4], 2, duration=50.0)
    second = session(at, [16] * 3, 1)
    at.run(starts=[0.0, 1.0])
    assert_well(at)
    assert second.last < 10


@pytest.mark.parametrize("count", [2, 3, 8])
def test_fixtures_that_stay_do_not_block(count: int) -> None:
    """Each worker keeps 2 of 9 GB between its tests of 5: the oldest can always go on."""
    at = host(9)
    for _ in range(count):
        session(at, [5] * 3, 2, keeps=1)
    at.run()
    assert_well(at)


def test_two_with_a_test_of_most_of_the_device() -> None:
    at = host(9)
    for _ in range(2):
        session(at, [7])
    at.run()
    assert_well(at)


def test_in_order_of_arrival() -> None:
    """Twenty sessions with tests of 2 of 22 GB."""
    at = host(22)
    for _ in range(20):
        session(at, [2] * 4, 1)
    at.run(starts=[0.01 * number for number in range(20)])
    assert_well(at)
    firsts = [each.admitted[0][0] for each in at.sessions]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("by_pid", [True, False], ids=["", "hidden PIDs"])
def test_session_that_comes_late_to_its_tests(by_pid: bool) -> None:
    """Each has a test that needs all of the device: who leases by the test first goes first.

    The one that was started first may take longer to collect.
    """
    at = host(9)
    late = session(at, [5, 9], 1, by_pid=by_pid)
    early = session(at, [2] * 8 + [9], 1, by_pid=by_pid)
    at.run(starts=[3.0, 0.0])
    assert_well(at)
    assert late.first is not None
    assert early.last <= late.first + 1.0


def test_where_pids_are_hidden_what_workers_keep_is_missing_twice() -> None:
    """Once as used and once as leased: the younger session gives up its fixtures and workers."""
    at = host(12)
    session(at, [3] * 7, 1, by_pid=False)
    session(at, [5] * 9, 3, keeps=1, by_pid=False)
    at.run(starts=[0.0, 1.0])
    assert_well(at)


SEEDS = [(seed, True) for seed in (*range(40), 397)] + [
    (seed, False) for seed in (*range(20), 21, 53, 63, 70, 76, 78, 83, 91, 125, 139, 149)
]


@pytest.mark.parametrize(("seed", "by_pid"), SEEDS)
def test_random_sessions(seed: int, by_pid: bool) -> None:
    """Whatever needs, fixtures, devices, workers and starts: all end, nothing is overcommitted.

    `by_pid`: whether the driver names the processes that hold VRAM.
    """
    draw = Random(seed)
    devices = draw.choice([1, 1, 2])
    total = draw.choice([9, 12, 24])
    at = host(total, devices)
    starts = []
    for _ in range(draw.randint(2, 5)):
        largest = draw.randint(2, total)
        needs = [draw.randint(2, largest) for _ in range(draw.randint(1, 15))]
        session(
            at,
            needs,
            draw.randint(1, 4),
            keeps=draw.choice([0, 0, 1, 3]),
            duration=draw.choice([0.05, 0.5, 2.0]),
            several=devices > 1 and draw.random() < 0.5,
            by_pid=by_pid,
        )
        starts.append(draw.uniform(0.0, 5.0))
    at.run(starts)
    assert_well(at)
