"""Tests that use models, on a small simulated machine: one model after another, none lost."""

from __future__ import annotations

import os
from itertools import groupby
from random import Random
from typing import Any

import pytest
from dispatching import Script, World
from dispatching.world import Device
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import (
    Admit,
    DeviceCapacity,
    Drop,
    Job,
    ModelGroup,
    Policy,
    Run,
    Worker,
)
from pytest_gpushare.units import GB, MB

CONTEXT = 600 * MB
CI = bool(os.environ.get("CI"))
ROOM = DeviceCapacity("GPU-0", "GPU 0", 20 * GB, 0, GB, 21 * GB, context=CONTEXT)
CPU = [Worker("gw0"), Worker("gw1"), Worker("gw2")]
GPU = [Worker(f"gw{number}", ("GPU-0",), 6 * GB) for number in range(3)]


def uses(model: int, count: int, **fields: Any) -> list[Job]:
    """So many tests of a model."""
    return [Job(f"m{model}::{number}", model=model, **fields) for number in range(count)]


def mixed(*jobs: list[Job]) -> list[Job]:
    """The tests of several kinds in turn, as they might be collected."""
    result: list[Job] = []
    queues = [list(each) for each in jobs]
    while any(queues):
        result += [queue.pop(0) for queue in queues if queue]
    return result


def models(count: int, parallel: int = 1) -> list[ModelGroup]:
    """So many models that are loaded when needed."""
    return [ModelGroup(f"m{number}", parallel, loads=True) for number in range(count)]


def order(world: World) -> list[int]:
    """The models in the order in which their tests ended, each once for each turn."""
    found = [world.jobs[test].model for test in world.outcomes]
    return [model for model, _ in groupby(m for m in found if m is not None)]


@pytest.mark.parametrize("workers", [CPU, GPU, CPU[:1], GPU[:1], [*GPU[:2], Worker("gw9")]])
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_one_model_after_another(workers: list[Worker], parallel: int, look_ahead: bool) -> None:
    """As many loads as models, whatever the order of collection and the kinds of workers."""
    plain = [Job(f"plain{number}") for number in range(20)]
    jobs = mixed(uses(0, 8), uses(1, 8), uses(2, 8), plain)
    world = World(jobs, [ROOM], workers, models=models(3, parallel), look_ahead=look_ahead).run()
    assert world.wrong == []
    assert all(outcome == ["done"] for outcome in world.outcomes.values())
    assert len(world.outcomes) == len(jobs)
    assert world.loads == order(world) == [0, 1, 2]


@pytest.mark.parametrize("workers", [CPU, GPU])
def test_as_many_at_once_as_the_server_answers(workers: list[Worker]) -> None:
    """Two at once: eight tests of a second take four, and a load."""
    world = World(uses(0, 8), [ROOM], workers, models=models(1, 2)).run()
    assert world.wrong == []
    assert world.makespan == pytest.approx(4.0, abs=0.2)


def test_the_others_run_while_a_model_is_loaded() -> None:
    """Nobody waits for a load but the tests of that model."""
    plain = [Job(f"plain{number}") for number in range(24)]
    world = World(mixed(uses(0, 3), plain), [ROOM], CPU, models=models(1), load=8.0).run()
    assert world.wrong == []
    assert world.makespan == pytest.approx(11.0, abs=1.1)


def waits(world: World) -> dict[int, float]:
    """Test -> how long it waited; those that did not left out."""
    found: dict[int, float] = {}
    for action in world.actions:
        admissions = {}
        if isinstance(action, Run):
            admissions = dict(action.admissions)
        elif isinstance(action, Admit):
            admissions = {action.test: action.admission}
        found.update({test: each.waited for test, each in admissions.items() if each.waited})
    return found


NEEDS = {"marked": True, "need": Need(6 * GB, source="marker")}


@pytest.mark.parametrize("fields", [{}, {"group": "g"}, NEEDS, {**NEEDS, "group": "g"}])
@pytest.mark.parametrize("workers", [CPU[:1], GPU[:1], [*GPU[:1], Worker("gw9")]])
@pytest.mark.parametrize(("busy", "waited"), [(0.0, 8.0), (5.0, 3.0), (20.0, 0.0)])
def test_wait_for_a_model(
    fields: dict[str, Any], workers: list[Worker], busy: float, waited: float
) -> None:
    """The first test waits from when a worker is free until its model is loaded; no other does."""
    if "need" in fields and not workers[0].devices:
        fields = {}
    if len(workers) > 1 and {"need", "group"} <= fields.keys():
        # The model is loaded when the group has its turn.
        waited = 8.0
    plain = [Job(f"plain{n}", "need" in fields) for n in range(1 if busy else 0)]
    jobs = [*plain, *uses(0, 3, **fields)]
    scripts = {n: Script(busy) for n in range(len(plain))}
    policy = Policy("loadgroup") if "group" in fields else None
    world = World(
        jobs, [ROOM], workers, models=models(1), load=8.0, scripts=scripts, policy=policy
    ).run()
    assert world.wrong == []
    assert world.loads == [0]
    assert sum(waits(world).values()) == pytest.approx(waited, abs=0.3)
    assert set(waits(world)) <= {len(plain)}


@pytest.mark.parametrize("workers", [CPU, GPU])
def test_model_that_cannot_be_loaded(workers: list[Worker]) -> None:
    """Its tests are reported with the reason, those of others run."""
    jobs = mixed(uses(0, 4), uses(1, 4))
    world = World(jobs, [ROOM], workers, models=models(2), failing=[0]).run()
    assert world.wrong == []
    assert len(world.outcomes) == 8
    assert world.loads == [1]


@pytest.mark.parametrize("workers", [CPU, GPU])
def test_missing_model_is_skipped(workers: list[Worker]) -> None:
    """Without a load."""
    groups = [ModelGroup("m0", refusal=("skip", "no model m0")), *models(2)[1:]]
    world = World(mixed(uses(0, 4), uses(1, 4)), [ROOM], workers, models=groups).run()
    assert world.wrong == []
    assert len(world.outcomes) == 8
    assert world.loads == [1]


def test_tests_that_need_vram_too() -> None:
    """They wait for both, on GPU workers."""
    both = uses(0, 6, marked=True, need=Need(6 * GB, source="marker"))
    gpu = [Job(f"gpu{n}", True, Need(9 * GB, source="marker")) for n in range(6)]
    world = World(mixed(both, uses(1, 4), gpu), [ROOM], GPU, models=models(2)).run()
    assert world.wrong == []
    assert all(outcome == ["done"] for outcome in world.outcomes.values())
    assert len(world.outcomes) == 16
    assert sorted(world.loads) == [0, 1]
    assert len([test for _, _, test, _ in world.admitted if jobs_model(world, test) == 0]) == 6


def jobs_model(world: World, test: int) -> int | None:
    """The model of a test."""
    return world.jobs[test].model


@pytest.mark.parametrize("workers", [CPU, GPU])
def test_groups_of_xdist_stay_together(workers: list[Worker]) -> None:
    """A group is on one worker, in order, though its tests use two models."""
    group = [Job(f"g{n}", group="g", model=n % 2) for n in range(4)]
    jobs = [*group, *uses(0, 4), *uses(1, 4)]
    world = World(jobs, [ROOM], workers, models=models(2), policy=Policy("loadgroup")).run()
    assert world.wrong == []
    assert all(outcome == ["done"] for outcome in world.outcomes.values())
    assert len(world.outcomes) == len(jobs)
    assert [test for test in world.outcomes if test < 4] == [0, 1, 2, 3]


@pytest.mark.parametrize("phase", ["beside", "before", "after"])
@pytest.mark.parametrize("cpus", [0, 1])
def test_phases(phase: str, cpus: int) -> None:
    """A model of 14 GB and tests of 9 GB on 20 GB: no spill, no test out of memory."""
    capacity = DeviceCapacity("GPU-0", "GPU 0", 20 * GB, 0, GB, 21 * GB, context=CONTEXT)
    groups = [ModelGroup("m0", loads=True, reservations={"GPU-0": 15 * GB})]
    gpu = [Job(f"gpu{n}", True, Need(9 * GB, source="marker"), duration=1.0) for n in range(8)]
    workers = [*GPU[:2], *([Worker("gw9")] if cpus else [])]
    world = World(
        mixed(uses(0, 6, duration=1.0), gpu), [capacity], workers, models=groups, phase=phase
    ).run()
    assert world.wrong == []
    assert all(outcome == ["done"] for outcome in world.outcomes.values())
    assert len(world.outcomes) == 14
    assert (world.loads, world.spills, world.out_of_memory) == ([0], 0, 0)
    first = next(iter(world.outcomes))
    if phase == "after":
        assert first >= 6 or world.jobs[first].model is None
    # 4 s of GPU tests, two at a time; 8 s for the load and 6 s of tests of the model.
    assert world.makespan <= 19.5


def test_small_tests_run_beside_a_model() -> None:
    """What fits next to the model runs meanwhile; what does not waits for it, and is not lost."""
    capacity = DeviceCapacity("GPU-0", "GPU 0", 20 * GB, 0, GB, 21 * GB, context=CONTEXT)
    groups = [ModelGroup("m0", loads=True, reservations={"GPU-0": 12 * GB})]
    small = [Job(f"s{n}", True, Need(3 * GB, source="marker"), duration=1.0) for n in range(12)]
    large = [Job(f"l{n}", True, Need(12 * GB, source="marker"), duration=1.0) for n in range(2)]
    jobs = mixed(uses(0, 8, duration=1.0), large, small)
    world = World(jobs, [capacity], [*GPU, Worker("gw9")], models=groups, load=2.0).run()
    assert world.wrong == []
    assert all(outcome == ["done"] for outcome in world.outcomes.values())
    assert len(world.outcomes) == len(jobs)
    assert (world.loads, world.spills, world.out_of_memory) == ([0], 0, 0)
    assert world.makespan <= 14.0


@pytest.mark.parametrize("vram", [0, 12 * GB])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_gpu_tests_do_not_starve_tests_of_a_model(vram: int, look_ahead: bool) -> None:
    """Without CPU workers they take their turn on GPU workers, and do not come last."""
    groups = [ModelGroup("m0", loads=True, reservations={"GPU-0": vram} if vram else {})]
    gpu = [Job(f"g{n}", True, Need(3 * GB, source="marker"), duration=1.0) for n in range(60)]
    jobs = [*gpu, *uses(0, 6, duration=1.0)]
    world = World(jobs, [ROOM], GPU, models=groups, load=2.0, look_ahead=look_ahead).run()
    assert world.wrong == []
    assert len(world.outcomes) == len(jobs)
    ended = list(world.outcomes)
    last = max(ended.index(test) for test in range(60, 66))
    # A load and six tests, one after another, beside two workers with GPU tests.
    assert last < 32


def test_place_is_left_to_another_session() -> None:
    """No test begins without a place, and the model stays; with it they go on."""
    world = World(uses(0, 4), [ROOM], CPU, models=models(1), load=1.0)
    world.models_of_run.limit(0, 0)
    world._at(20.0, world.models_of_run.limit, 0, 1)
    world._at(20.0, world._step)
    world.run()
    assert world.wrong == []
    assert world.loads == [0]
    assert (world.first, world.last) == (20.0, pytest.approx(24.0, abs=0.2))


def test_test_that_does_not_fit_beside_its_own_model() -> None:
    """It fails before the first test starts, with both figures."""
    groups = [ModelGroup("m0", loads=True, reservations={"GPU-0": 15 * GB})]
    jobs = uses(0, 2, marked=True, need=Need(9 * GB, source="marker"))
    capacity = DeviceCapacity("GPU-0", "GPU 0", 20 * GB, 0, GB, 21 * GB, context=CONTEXT)
    world = World(jobs, [capacity], GPU, models=groups).run()
    assert world.loads == []
    reasons = {
        a.refusal[1]
        for r in world.actions
        if isinstance(r, Run)
        for a in r.admissions.values()
        if a.refusal
    }
    assert len(world.outcomes) == 2
    assert all("next to its model m0, which takes 15.0 GB" in reason for reason in reasons)
    assert reasons


def suite(count: int, seed: int) -> dict[str, Any]:
    """The arguments of a world with models, VRAM, groups, crashes and models that are missing."""
    draw = Random(seed)
    budget = draw.randint(6, 24) * GB
    room = DeviceCapacity("GPU-0", "GPU 0", budget, 0, GB, budget + GB, context=CONTEXT)
    holds = draw.random() < 0.5
    gpus, cpus = draw.choice([(0, 2), (2, 0), (1, 1), (3, 2), (1, 0), (0, 1)])
    workers = [Worker(f"gw{n}", ("GPU-0",), budget // max(1, gpus)) for n in range(gpus)]
    workers += [Worker(f"gw{gpus + n}") for n in range(cpus)]
    groups = [
        ModelGroup(
            f"m{number}",
            draw.randint(1, 3),
            loads=draw.random() < 0.8,
            reservations={"GPU-0": draw.randint(2, budget // GB) * GB} if holds and gpus else {},
            refusal=("skip", "missing") if draw.random() < 0.2 else None,
        )
        for number in range(draw.randint(1, 4))
    ]
    jobs, scripts = [], {}
    for number in range(count):
        marked = bool(gpus) and draw.random() < 0.4
        size = draw.choice([None, draw.randint(1, 12) * GB // 2])
        model = draw.choice([None, *range(len(groups))])
        duration = draw.randint(1, 40) / 20
        jobs.append(
            Job(
                f"t{number}",
                marked,
                Need(size, source="marker") if marked else None,
                draw.choice(["", "", "a", "b"]),
                draw.choice([None, duration]),
                model=model,
            )
        )
        scripts[number] = Script(
            duration, crashes=draw.random() < 0.08, teardown=draw.choice([0.0, 0.3])
        )
    return {
        "jobs": jobs,
        "rooms": [room] if gpus else [],
        "workers": workers,
        "scripts": scripts,
        "models": groups,
        "load": draw.choice([0.5, 8.0]),
        "failing": {n for n in range(len(groups)) if draw.random() < 0.1},
        "policy": Policy(draw.choice(["load", "worksteal", "loadgroup", "loadscope"])),
        "look_ahead": draw.random() < 0.3,
        "phase": draw.choice(["beside", "beside", "before", "after"]),
    }


def faults(count: int, made: dict[str, Any], seed: int) -> dict[str, Any]:
    """What may go wrong in such a world besides: workers that do not come back or collected less,
    tests that come again, other sessions, VRAM that comes back late or that others take."""
    draw = Random(seed + 0.5)
    more: dict[str, Any] = {
        "by_pid": draw.random() < 0.75,
        "late": draw.choice([0.0, 0.0, 0.5]),
        "restarts": draw.choice([100, 100, 100, 1, 0]),
        "reruns": draw.choice([0, 0, 3]),
        "turn": draw.choice([0.0, 0.0, 3.0]),
    }
    workers = made["workers"]
    if draw.random() < 0.2:
        # Of each kind the first one has collected all.
        firsts = {bool(worker.devices): worker.id for worker in reversed(workers)}
        more["collected"] = {
            worker.id: {test for test in range(count) if draw.random() < 0.8}
            for worker in workers
            if worker.id not in firsts.values() and draw.random() < 0.6
        }
    if made["rooms"] and draw.random() < 0.3:
        (room,) = made["rooms"]
        start, size = draw.uniform(0, 10), draw.randint(1, 12) * GB
        end = start + draw.choice([10, 40, 1e9])
        taken = Device(room.budget + GB, others=lambda at: size if start <= at < end else 0)
        more["devices"] = {room.uuid: taken}
    return more


@settings(max_examples=60 if CI else 200, derandomize=CI)
@given(st.integers(1, 30), st.integers(0, 2**32))
@example(29, 309)
@example(31, 5505)
@example(30, 7930)
@example(16, 13908)
@example(25, 63)
@example(30, 34550)
def test_random_suites(count: int, seed: int) -> None:
    """No test is missing or begun twice, no model is used by too many, or before it is there."""
    world = World(**suite(count, seed)).run(limit=3000)
    assert world.wrong == []
    assert len(world.outcomes) == count
    assert all(len(outcomes) == 1 for outcomes in world.outcomes.values()), world.outcomes
    assert not any("is left" in said for said in reasons(world))


@settings(max_examples=60 if CI else 200, derandomize=CI)
@given(st.integers(1, 40), st.integers(0, 2**32))
@example(34, 17)
@example(37, 211)
@example(25, 1393)
@example(19, 1453)
@example(28, 55668)
@example(35, 63445)
def test_random_suites_with_faults(count: int, seed: int) -> None:
    """No test is missing or reported twice, as long as there is a worker."""
    made = suite(count, seed)
    made.update(faults(count, made, seed))
    world = World(**made).run(limit=3000)
    assert len(world.outcomes) == count or not any(p.alive for p in world.processes.values())
    assert all(len(outcomes) == 1 for outcomes in world.outcomes.values()), world.outcomes
    # VRAM that comes back late, or that others took, may be missing.
    assert [text for text in world.wrong if not text.endswith(" free")] == []


def reasons(world: World) -> list[str]:
    """Why tests were not run, or not as they should be."""
    said = [a.reason for a in world.actions if isinstance(a, Drop)]
    for run in world.actions:
        for found in run.admissions.values() if isinstance(run, Run) else ():
            said += [found.note, found.refusal[1] if found.refusal else ""]
    return said


def test_both_kinds_wait_for_the_worker_that_comes() -> None:
    """The only worker is down when the model is there: its tests wait for the next one."""
    crash = [Job("gpu", True, Need(GB, source="marker"))]
    both = uses(0, 2, marked=True, need=Need(GB, source="marker"))
    scripts = {0: Script(0.2, crashes=True)}
    world = World(
        [*crash, *both], [ROOM], GPU[:1], models=models(1, 2), load=0.2, scripts=scripts
    ).run()
    assert world.outcomes == {0: ["crashed"], 1: ["done"], 2: ["done"]}
    assert not any(reasons(world))


def test_test_that_comes_again_holds_no_worker() -> None:
    """It waits for a place of its model like the others, and not in the only worker, for which
    those wait that have the places."""
    both = uses(0, 3, marked=True, need=Need(GB, source="marker"))
    jobs = [*uses(0, 1), *both, Job("plain")]
    scripts = {0: Script(0.2, crashes=True)}
    world = World(
        jobs, [ROOM], GPU[:1], models=models(1, 2), load=0.2, scripts=scripts, reruns=1, restarts=2
    ).run(limit=1000)
    assert world.wrong == []
    assert world.outcomes == {0: ["crashed"], **{test: ["done"] for test in range(1, 5)}}
