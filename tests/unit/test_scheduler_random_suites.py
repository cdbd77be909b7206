"""Random suites on a small simulated machine: whatever happens, the plan keeps its promises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random
from typing import Any

from dispatching import Device, Script, World
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import (
    Admission,
    Admit,
    DeviceCapacity,
    Job,
    Policy,
    Run,
    Worker,
)
from pytest_gpushare.units import GB, MB

CONTEXT = 600 * MB
SEEDS = st.integers(0, 2**32)
CI = bool(os.environ.get("CI"))
"""There the same examples are drawn each time; elsewhere others."""

COUNTS = st.integers(1, 30)


def need(draw: Random, devices: int) -> Need:
    """A need as markers, rules, or earlier runs give it."""
    return Need(
        draw.choice([None, draw.randint(1, 26) * GB // 2]),
        draw.choice([1, 1, 1, 1, 1, devices]),
        exclusive=draw.random() < 0.1,
        required=draw.random() < 0.1,
        source=draw.choice(["marker", "learned"]),
    )


def suite(count: int, seed: int, *, faults: bool, **policy: Any) -> dict[str, Any]:
    """The arguments of a world. A seed: to draw each value by itself takes longer than the run."""
    draw = Random(seed)
    uuids = [f"GPU-{number}" for number in range(draw.randint(1, 3))]
    seen = draw.random() < 0.5
    budgets = {uuid: draw.randint(4, 24) * GB for uuid in uuids}
    rooms = [
        DeviceCapacity(uuid, f"GPU {uuid[-1]}", size, 0, GB, size + GB, context=CONTEXT)
        for uuid, size in budgets.items()
    ]
    owned = [uuids[number % len(uuids)] for number in range(draw.randint(1, 6))]
    workers = [
        Worker(
            f"gw{number}",
            (own, *(uuid for uuid in uuids if uuid != own)) if seen else (own,),
            budgets[own] // owned.count(own),
        )
        for number, own in enumerate(owned)
    ]
    workers += [Worker(f"gw{len(owned) + number}") for number in range(draw.randint(0, 3))]
    jobs, scripts = [], {}
    by_pid = faults or draw.random() < 0.5
    # Where NVML names no process, what comes back late looks like what a test has taken; and
    # short tests are sent together, before what the first of them held can have come back.
    late = draw.choice([0.0, 0.0, 1.0, 40.0]) if by_pid else 0.0
    for number in range(count):
        marked = draw.random() < 0.6
        wanted = need(draw, len(uuids)) if marked else draw.choice([None, Need(0)])
        duration = draw.randint(3 if late else 1, 40) / 20
        group = draw.choice(["", "", "a", "b", "c"])
        known = draw.choice([None, duration])
        jobs.append(Job(f"t{number}", marked, wanted, group, known))
        lies = faults and wanted is not None and draw.random() < 0.15
        scripts[number] = Script(
            duration,
            3 * (wanted.vram or GB) if lies and wanted else None,
            draw.choice([0, 0, draw.randint(0, 4) * GB // 2]),
            faults and draw.random() < 0.1,
            draw.choice([0.0, 0.0, 0.3]),
            frees=number % 2 == 0,
        )
    devices = {uuid: Device(size + GB) for uuid, size in budgets.items()}
    if faults and draw.random() < 0.5:
        start, end, size = draw.randint(0, 5), draw.randint(6, 400), draw.randint(1, 26) * GB // 2
        devices[uuids[0]].others = lambda at: size if start <= at < end else 0
    collected = {
        # The first worker knows all: what no worker has collected is no test.
        worker.id: set(range(count)) - {draw.randrange(count) for _ in range(3)}
        for worker in workers[1:]
        if draw.random() < 0.25
    }
    rules = Policy(
        dist=draw.choice(["load", "loadscope", "loadfile", "worksteal"]),
        without_gpu=draw.choice(["run", "skip", "fail"]),
        empty_caches=draw.choice(["when-needed", "always", "never"]),
        pressure_timeout=draw.choice([0.0, 5.0, 300.0]),
        visible_devices="all" if seen else "own",
    )
    return {
        "jobs": jobs, "rooms": rooms, "workers": workers, "scripts": scripts, "devices": devices,
        "collected": collected,
        "by_pid": by_pid,
        "late": late,
        "restarts": draw.choice([0, 1, 100]),
        "look_ahead": draw.random() < 0.3,
        "policy": rules._replace(**policy),
    }  # fmt: skip


def admissions(world: World) -> Iterator[Admission]:
    """How the tests were admitted."""
    for action in world.actions:
        if isinstance(action, Run):
            yield from action.admissions.values()
        elif isinstance(action, Admit):
            yield action.admission


def once_each(world: World) -> None:
    """Every test has exactly one outcome, unless nobody was left who could run it."""
    assert [test for test, found in world.outcomes.items() if len(found) != 1] == []
    missing = set(range(len(world.jobs))) - world.outcomes.keys()
    assert not missing or not any(process.alive for process in world.processes.values())


@settings(max_examples=200, derandomize=CI)
@given(COUNTS, SEEDS)
@example(35, 101270)
@example(28, 130557)
@example(20, 1654606)
def test_well_behaved_suites(count: int, seed: int) -> None:
    """No overcommit, no deadlock, no starvation, no memory error, one outcome each."""
    world = World(**suite(count, seed, faults=False)).run(limit=5000)
    assert world.wrong == []
    once_each(world)
    if not any(found.note for found in admissions(world)):
        assert world.out_of_memory == 0


@settings(max_examples=200, derandomize=CI)
@given(COUNTS, SEEDS)
@example(19, 6450)
@example(20, 270)
@example(2, 150345819)
@example(29, 304384)
@example(37, 303363)
def test_suites_with_faults(count: int, seed: int) -> None:
    """The same with crashes, pressure from outside, and tests that take 3 × their need."""
    made = suite(count, seed, faults=True)
    world = World(**made).run(limit=20000)
    liars = any(script.peak is not None for script in made["scripts"].values())
    assert [text for text in world.wrong if not liars or "beside" in text] == []
    once_each(world)


@settings(max_examples=80, derandomize=CI)
@given(COUNTS, SEEDS)
@example(19, 915288)
@example(21, 12062)
def test_groups_stay_together(count: int, seed: int) -> None:
    """Under loadscope all tests of a group go to one worker of each kind, as long as it lives."""
    made = suite(count, seed, faults=False, dist="loadscope", pressure_timeout=1000.0)
    made.update(collected={}, late=0.0)
    made["jobs"] = [
        job._replace(need=job.need and job.need._replace(devices=1, vram=None))
        for job in made["jobs"]
    ]
    world = World(**made).run(limit=5000)
    places: dict[tuple[str, bool], list[str]] = {}
    for action in world.actions:
        # One that is bound and waits may be withdrawn: it has set up nothing.
        if isinstance(action, Run) and action.admitted:
            started = action.tests
        else:
            started = (action.test,) if isinstance(action, Admit) else ()
        for test in started:
            job = world.jobs[test]
            if job.group:
                places.setdefault((job.group, job.marked), []).append(action.worker)
    # One whose VRAM was in the way of an older test has ended, and its groups go on elsewhere.
    ended = {note.facts["worker"] for note in world.tells("worker-ended")}
    assert [key for key, found in places.items() if len({*found} - ended) > 1] == []
