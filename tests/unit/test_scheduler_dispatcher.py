"""The dispatcher's rules, each with figures: routing, admission, room, patience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from dispatching import Device, Script, World

from pytest_gpushare.scheduler.dispatcher import Dispatcher
from pytest_gpushare.scheduler.needs import IN_ORDER, Need
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Admit,
    DeviceCapacity,
    DeviceReading,
    Drop,
    EmptyCaches,
    Job,
    Note,
    Park,
    Policy,
    Recall,
    Run,
    Shutdown,
    Worker,
)
from pytest_gpushare.units import GB, MB

GPU, OTHER = "GPU-0", "GPU-1"
CONTEXT = 600 * MB


def gpu_test(
    name: str, gigabytes: float | None = None, *, duration: float | None = None, group: str = "",
    marked: bool = True, source: str = "marker", devices: int = 1, exclusive: bool = False,
    required: bool = False,
) -> Job:  # fmt: skip
    vram = None if gigabytes is None else int(gigabytes * GB)
    need = Need(vram, devices, exclusive, required, source if vram else "slot")
    return Job(name, marked, need, group, duration)


def gpu_worker(number: int, slot: float = 4.5, device: str = GPU, *others: str) -> Worker:
    return Worker(f"gw{number}", (device, *others), int(slot * GB))


def dispatcher_of(
    jobs: Sequence[Job], workers: Sequence[Worker], *, budget: float = 10,
    policy: Policy | None = None,
    context: int = 0, rooms: Sequence[DeviceCapacity] = (), reservation: int = 0, safety: int = 0,
) -> Dispatcher:  # fmt: skip
    """A dispatcher whose workers are up."""
    room = DeviceCapacity(GPU, "GPU 0", int(budget * GB), reservation, safety, context=context)
    made = Dispatcher(jobs, rooms or [room], policy)
    for worker in workers:
        made.worker_up(worker)
    return made


def runs(actions: Sequence[Action]) -> dict[str, tuple[int, ...]]:
    """Worker -> tests that it may run."""
    return {
        action.worker: action.tests if isinstance(action, Run) else (action.test,)
        for action in actions
        if (isinstance(action, Run) and action.admitted) or isinstance(action, Admit)
    }


def waiting(actions: Sequence[Action]) -> dict[str, int]:
    """Worker -> test that waits there for its admission."""
    return {a.worker: a.tests[0] for a in actions if isinstance(a, Run) and not a.admitted}


def refusals(world: World) -> dict[int, tuple[str, str]]:
    """Test -> outcome and reason of those that were not run."""
    admissions: dict[int, Admission] = {}
    for action in world.actions:
        if isinstance(action, Run):
            admissions.update(action.admissions)
        elif isinstance(action, Admit):
            admissions[action.test] = action.admission
    return {test: found.refusal for test, found in admissions.items() if found.refusal}


def run_of(worker: str, test: int, need: int, source: str, **more: Any) -> Run:
    """One GPU test that was admitted at once."""
    return Run(worker, (test,), {test: Admission(need, source, **more)})


def free(gigabytes: float, **held: float) -> dict[str, DeviceReading]:
    """A reading of the first device."""
    return {
        GPU: DeviceReading(
            int(gigabytes * GB), 0, {w: int(s * GB) for w, s in held.items()}, "blender"
        )
    }


# --- admission ---


def test_two_that_fit_and_one_that_waits() -> None:
    """Of 6, 6 and 4 GB on 10 GB one of 6 and that of 4 run; the other follows."""
    made = dispatcher_of(
        [gpu_test("a", 6), gpu_test("b", 6), gpu_test("c", 4)], [gpu_worker(0), gpu_worker(1)]
    )
    assert made.step(free(24), 0) == [
        run_of("gw0", 0, 6 * GB, "marker"),
        run_of("gw1", 2, 4 * GB, "marker"),
    ]
    made.finished("gw1", 2)
    assert made.step(free(14), 1) == []
    made.finished("gw0", 0)
    found = runs(made.step(free(24), 2))
    assert list(found.values()) == [(1,)]
    made.finished(*found, 1)
    assert made.is_done
    assert made.step({}, 3) == []


@pytest.mark.parametrize(
    ("available", "resident", "starts"),
    [(22.0, 0.0, True), (21.9, 0.0, False), (11.21, 10.8, True), (11.1, 10.8, False)],
)
def test_live_room(available: float, resident: float, starts: bool) -> None:
    """free − outstanding reservation − safety buffer: 22 − 12 − 1 leaves 9 GB for a need of 9."""
    made = dispatcher_of(
        [gpu_test("a", 9)], [gpu_worker(0)], budget=24, reservation=12 * GB, safety=GB
    )
    reading = {GPU: DeviceReading(int(available * GB), int(resident * GB))}
    assert bool(runs(made.step(reading, 0))) is starts


def test_what_a_running_test_will_still_take_is_not_free() -> None:
    """A need of 6 GB of which 2 are taken leaves 9 − (6 − 2) = 5 of 9 free."""
    made = dispatcher_of(
        [gpu_test("a", 6), gpu_test("b", 5.5), gpu_test("c", 5)],
        [gpu_worker(0), gpu_worker(1)],
        budget=20,
    )
    assert runs(made.step(free(6), 0)) == {"gw0": (0,)}
    assert runs(made.step(free(9, gw0=2), 1)) == {"gw1": (2,)}


def test_a_test_that_takes_more_than_its_need_is_believed() -> None:
    """Its account is what NVML says: 9 of 10 GB leave no room for 2."""
    made = dispatcher_of([gpu_test("liar", 3), gpu_test("b", 2)], [gpu_worker(0), gpu_worker(1)])
    made.step({GPU: DeviceReading(4 * GB)}, 0)
    made = dispatcher_of([gpu_test("liar", 3), gpu_test("b", 2)], [gpu_worker(0)])
    assert runs(made.step(free(24), 0)) == {"gw0": (0,)}
    made.worker_up(gpu_worker(1))
    assert runs(made.step(free(15, gw0=9), 1)) == {}


def test_where_nvml_names_no_process() -> None:
    """What the device lost since the plan is its running tests', up to their needs.

    Of 22 GB a test with 4.5 took all: 17.5 are free. Were its need set aside once more, the
    second slot of the plan's 9 GB would stay empty.
    """
    room = DeviceCapacity(GPU, "GPU 0", 9 * GB, 12 * GB, GB, 22 * GB, context=CONTEXT)
    made = dispatcher_of(
        [gpu_test("a"), gpu_test("b"), gpu_test("c")], [gpu_worker(0), gpu_worker(1)], rooms=[room]
    )
    assert len(runs(made.step({GPU: DeviceReading(22 * GB, 0)}, 0))) == 2
    made.finished("gw1", 1)
    reading = {GPU: DeviceReading(int(17.5 * GB) - CONTEXT, 0)}
    assert runs(made.step(reading, 1)) == {"gw1": (2,)}


def test_what_is_held_after_a_test_stays_on_the_account() -> None:
    """A worker that keeps 5 of 10 GB leaves 5 for its neighbour, and all for itself."""
    for need, worker in ((5, "gw0"), (6, "gw0"), (7, "gw0")):
        made = dispatcher_of([gpu_test("a", 7), gpu_test("b", need)], [gpu_worker(0)])
        ((first,),) = runs(made.step(free(24), 0)).values()
        made.finished("gw0", first, {GPU: 5 * GB})
        made.worker_up(gpu_worker(1))
        assert list(runs(made.step(free(19), 1))) == [worker]


def test_a_dead_workers_account_is_closed() -> None:
    """The test that it ran is over, and its VRAM is there for others."""
    made = dispatcher_of([gpu_test("a", 9), gpu_test("b", 9)], [gpu_worker(0), gpu_worker(1)])
    assert runs(made.step({}, 0)) == {"gw0": (0,)}
    assert made.worker_down("gw0", replaced=True) == 0
    assert runs(made.step({}, 1)) == {"gw1": (1,)}


def test_a_learned_need_beyond_the_budget() -> None:
    """Its margin is what does not fit: it gets the whole budget. A declared one is refused."""
    made = dispatcher_of([gpu_test("a", 11, source="learned")], [gpu_worker(0)])
    assert made.step({}, 0) == [run_of("gw0", 0, 10 * GB, "learned")]


def test_the_first_step_wants_a_reading() -> None:
    """Unmarked tests get slots, but where there are CPU workers they need nothing."""
    assert dispatcher_of([Job("a")], [gpu_worker(0)]).wants_reading
    assert not dispatcher_of([Job("a")], [gpu_worker(0), Worker("gw1")]).wants_reading
    assert dispatcher_of([gpu_test("a")], [gpu_worker(0), Worker("gw1")]).wants_reading


# --- what can never run ---


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (
            gpu_test("huge", 40),
            "needs 40.0 GB of VRAM (by its marker), and the largest budget is 10.0 GB (GPU 0): "
            "lower the need, or leave more to the tests with "
            "gpu_share_ollama_vram_reservation_mb, gpu_share_safety_buffer_mb or free VRAM",
        ),
        (
            gpu_test("two", 1, devices=2),
            "needs 2 devices, and a worker sees its own alone (gpu_share_visible_devices = own): "
            "set it to all",
        ),
        (
            gpu_test("three", 1, devices=3),
            "needs 3 devices, and this run has 2: run it where there are more, or leave it out "
            "with -m or -k",
        ),
        (gpu_test("odd")._replace(refusal="wrong marker"), "wrong marker"),
    ],
)
def test_never_fits(job: Job, text: str) -> None:
    """It fails at once, with figures and remedy; the others run."""
    rooms = [DeviceCapacity(GPU, "GPU 0", 10 * GB), DeviceCapacity(OTHER, "GPU 1", 8 * GB)]
    made = dispatcher_of([job, gpu_test("small", 4)], [gpu_worker(0)], rooms=rooms)
    assert made.step({}, 0) == [Run("gw0", (0,), {0: Admission(refusal=("fail", text))})]
    made.finished("gw0", 0)
    assert runs(made.step({}, 0)) == {"gw0": (1,)}


def test_a_need_for_the_larger_device() -> None:
    """It waits for the worker that has it."""
    rooms = [DeviceCapacity(GPU, "GPU 0", 6 * GB), DeviceCapacity(OTHER, "GPU 1", 12 * GB)]
    made = dispatcher_of(
        [gpu_test("big", 10)], [gpu_worker(0), gpu_worker(1, 4, OTHER)], rooms=rooms
    )
    assert runs(made.step({}, 0)) == {"gw1": (0,)}


# --- several devices, exclusive ---


def test_several_devices_at_once_or_not_at_all() -> None:
    """5 GB on both devices: not beside 6 GB on one of them."""
    rooms = [DeviceCapacity(GPU, "GPU 0", 10 * GB), DeviceCapacity(OTHER, "GPU 1", 10 * GB)]
    workers = [gpu_worker(0, 4, GPU, OTHER), gpu_worker(1, 4, OTHER, GPU)]
    jobs = [gpu_test("one", 6), gpu_test("both", 5, devices=2)]
    policy = Policy(visible_devices="all")
    made = dispatcher_of(jobs, workers, rooms=rooms, policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,)}
    made.finished("gw0", 0, {GPU: 0})
    (run,) = runs(made.step({}, 1)).values()
    assert run == (1,)


def test_exclusive() -> None:
    """Nothing starts beside it, and it starts beside nothing."""
    jobs = [gpu_test("alone", 1, exclusive=True), gpu_test("a", 1), gpu_test("b", 1)]
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)])
    (run,) = made.step({}, 0)
    assert run == run_of("gw0", 0, GB, "marker", alone=True)
    made.finished("gw0", 0)
    assert len(runs(made.step({}, 1))) == 2


# --- ageing ---


def test_a_big_test_is_not_starved() -> None:
    """9 of 10 GB among 500 tests of 2 GB that never end together: it gets its turn early."""
    small = [gpu_test(f"s{n}", 2) for n in range(500)]
    jobs = [*small[:6], gpu_test("big", 9), *small[6:]]
    world = World(
        jobs,
        [DeviceCapacity(GPU, "GPU 0", 10 * GB)],
        [gpu_worker(n, 2) for n in range(5)],
        scripts={n: Script(1 + n % 7 * 0.13) for n in range(len(jobs))},
    )
    world.dispatcher._gpu.at = 0.0
    world.run()
    place = [test for _, _, test, _ in world.admitted].index(6)
    assert world.wrong == []
    assert place <= 6 + 3 * 5 + 5, place


def test_a_bound_test_is_not_starved() -> None:
    """The same for the second test of a group whose first one fitted."""
    jobs = [gpu_test("g1", 2, group="g"), gpu_test("g2", 9, group="g")]
    jobs += [gpu_test(f"s{n}", 2) for n in range(300)]
    world = World(
        jobs,
        [DeviceCapacity(GPU, "GPU 0", 10 * GB)],
        [gpu_worker(n, 2) for n in range(5)],
        scripts={n: Script(1 + n % 7 * 0.13) for n in range(len(jobs))},
        policy=Policy(dist="loadfile"),
    ).run()
    order = [test for _, _, test, _ in world.admitted]
    assert order.index(1) - order.index(0) <= 3 * 5 + 10


def test_a_worker_with_more_on_another_device_is_tried_too() -> None:
    """Two idle workers hold the same on theirs; only one of them fits on both devices."""
    other = "GPU-1"
    rooms = [DeviceCapacity(GPU, "GPU 0", 10 * GB), DeviceCapacity(other, "GPU 1", 10 * GB)]
    workers = [gpu_worker(0, 4, GPU, other), gpu_worker(1, 4, GPU, other)]
    jobs = [gpu_test("a", 2), gpu_test("both", 2, devices=2), gpu_test("large", 9, devices=2)]
    policy = Policy(dist="loadscope", reorder=False, visible_devices="all", empty_caches="never")
    jobs = [job._replace(group=job.nodeid) for job in jobs]
    made = dispatcher_of(jobs, workers, rooms=rooms, policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,)}
    made.finished("gw0", 0, {GPU: GB})
    made.finished("gw1", 1, {GPU: GB, other: 2 * GB})
    # 9 beside the 1 of gw0 on the first device; on the second gw1 holds 2 of 10 itself.
    assert runs(made.step({}, 1)) == {"gw1": (2,)}


# --- making room ---


def two_that_keep(first: float, second: float) -> Dispatcher:
    """Two workers that keep so many GB after their tests; a test of 9.8 GB waits."""
    jobs = [gpu_test("a", 5, group="a"), gpu_test("b", 5, group="b"), gpu_test("c", 9.8)]
    # It needs the device alone, so it would come first.
    policy = Policy(dist="loadscope", reorder=False)
    workers = [gpu_worker(0), gpu_worker(1)]
    made = dispatcher_of(jobs, workers, budget=10.5, context=CONTEXT, policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,)}
    made.finished("gw0", 0, {GPU: int(first * GB)})
    made.finished("gw1", 1, {GPU: int(second * GB)})
    return made


def test_caches_of_a_neighbour_are_emptied() -> None:
    """3 GB that it keeps are in the way of 9.8 on 10.5: it is asked, and only it."""
    made = two_that_keep(4, 3)
    assert made.step({}, 1) == [EmptyCaches("gw1")]
    assert made.step({}, 2) == []
    made.emptied("gw1", {GPU: CONTEXT})
    assert runs(made.step({}, 3)) == {"gw0": (2,)}


def test_a_worker_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    """After ten seconds the next way of making room is tried."""
    made = two_that_keep(4, 3)
    made.step({}, 1)
    assert made.step({}, 10) == []
    assert made.step({}, 12)[0] == Shutdown("gw1")


@pytest.mark.parametrize("marked", [True, False])
def test_idle_workers_wait_for_the_tests_of_a_host_that_is_lost(marked: bool) -> None:
    """A worker that asks in vain gets what one of another host had not begun."""
    rooms = [DeviceCapacity(device, device, 10 * GB) for device in (GPU, OTHER)]
    jobs = [gpu_test(name, 4, marked=marked) for name in "abc"]
    workers = [gpu_worker(0), gpu_worker(1, 4.5, OTHER)]
    made = dispatcher_of(jobs, workers, rooms=rooms, policy=Policy(awaits_losses=True))
    first = runs(made.step({}, 0))
    assert len(first) == 2
    made.next_test_requested("gw0", first["gw0"][-1], "end")
    (last,) = runs(made.step({}, 1))["gw0"]
    made.next_test_requested("gw1", first["gw1"][-1], "end")
    assert made.step({}, 2) == [Park("gw1")]
    made.finished("gw1", first["gw1"][-1])
    assert made.worker_down("gw0") == first["gw0"][0]
    assert runs(made.step({}, 3)) == {"gw1": (last,)}


def test_room_is_made_the_gentlest_way_first() -> None:
    """Caches, then the worker itself."""
    made = two_that_keep(4, 3)
    assert made.step({}, 1) == [EmptyCaches("gw1")]
    made.emptied("gw1", {GPU: 3 * GB // 2})
    ended, told = made.step({}, 3)
    assert ended == Shutdown("gw1")
    assert isinstance(told, Note)
    assert told.text == "gw1 ended: its 1.5 GB were in the way of c"
    assert made.step({}, 4) == []
    made.worker_down("gw1")
    assert runs(made.step({}, 5)) == {"gw0": (2,)}


def test_room_is_made_for_the_worker_that_may_begin_the_group() -> None:
    """The one that holds most had the group before; nobody waited for the other's room."""
    jobs = [gpu_test("a", 5, group="a"), gpu_test("b", 10.5, group="b")]
    policy = Policy(dist="loadscope", reorder=False)
    made = dispatcher_of(jobs, [gpu_worker(0)], budget=10.5, context=CONTEXT, policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,)}
    made.worker_up(gpu_worker(1))
    made._gpu.workers["gw0"].left_groups.add("b")
    made.finished("gw0", 0, {GPU: CONTEXT})
    ended, told = made.step({}, 1)
    assert ended == Shutdown("gw0")
    assert isinstance(told, Note)
    made.worker_down("gw0")
    assert runs(made.step({}, 2)) == {"gw1": (1,)}


def test_caches_are_left_alone_where_the_user_says_so() -> None:
    """`empty_caches = never`: workers only."""
    made = two_that_keep(4, 3)
    made._gpu.policy = made._gpu.policy._replace(empty_caches="never")
    assert made.step({}, 1)[0] == Shutdown("gw1")


def test_without_durations_a_worker_waits_for_what_will_fit_first() -> None:
    """Not for the first in the order: its VRAM would be idle longer, as those that began end."""
    jobs = [gpu_test(f"t{number}", need) for number, need in enumerate((5, 3, 2, 9, 5))]
    made = dispatcher_of(jobs, [gpu_worker(number, 2) for number in range(3)])
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,), "gw2": (2,)}
    made.next_test_requested("gw2", 2, "end")
    assert waiting(made.step({}, 1)) == {"gw2": 4}


def test_a_bound_test_is_withdrawn_where_its_fixtures_are_in_the_way() -> None:
    """Two workers wait, each with fixtures that keep the other from starting: the later yields."""
    jobs = [gpu_test(name, need) for name, need in (("a", 5), ("b", 5), ("c", 9), ("d", 9))]
    policy = Policy(dist="loadscope", reorder=False)
    made = dispatcher_of(
        jobs, [gpu_worker(0), gpu_worker(1)], budget=10.5, context=CONTEXT, policy=policy
    )
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,)}
    made.next_test_requested("gw0", 0, "end")
    assert waiting(made.step({}, 1)) == {"gw0": 2}
    made.next_test_requested("gw1", 1, "end")
    assert waiting(made.step({}, 1)) == {"gw1": 3}
    made.finished("gw0", 0, {GPU: 2 * GB})
    made.finished("gw1", 1, {GPU: 3 * GB})
    assert made.step({}, 2) == [EmptyCaches("gw1")]
    made.emptied("gw1", {GPU: 3 * GB})
    assert made.step({}, 3) == [EmptyCaches("gw1", withdraw=True)]
    made.emptied("gw1", {GPU: CONTEXT})
    assert runs(made.step({}, 4)) == {"gw0": (2,)}
    made.next_test_requested("gw0", 2, "end")
    assert runs(made.step({}, 5)) == {"gw0": (3,)}


def test_a_test_that_needs_the_device_alone_comes_first() -> None:
    """Then its neighbours have no contexts yet, and none of them has to end."""
    jobs = [gpu_test(f"s{n}", 2) for n in range(8)]
    jobs.insert(4, gpu_test("whole", 10))
    world = World(
        jobs,
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, context=CONTEXT)],
        [gpu_worker(n) for n in range(3)],
    ).run()
    assert world.admitted[0][2] == 4
    assert world.tells("worker-ended") == []


# --- others in the way ---


def pressed(**policy: object) -> World:
    """Others hold 8 of 11 GB from the first second to the hundredth; two tests need 6."""
    jobs = [gpu_test("a", 6), gpu_test("b", 6), gpu_test("c", 2), Job("plain")]
    return World(
        jobs,
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB)],
        [gpu_worker(0), Worker("gw1")],
        devices={GPU: Device(11 * GB, others=lambda at: 8 * GB if 0.5 <= at < 100 else 0)},
        policy=Policy()._replace(**policy),  # type: ignore[arg-type]
    )


def test_pressure_is_waited_for() -> None:
    """The small test goes on, the big one waits, and both are told of."""
    world = pressed().run()
    starts = {test: at for at, _, test, _ in world.admitted}
    assert starts[2] < 100 <= max(starts[0], starts[1]) < 101
    (pressure,) = world.tells("pressure")
    assert pressure.text == (
        "GPU 0: b needs 6.0 GB and waits: 2.0 GB is left for tests; held by somebody"
    )
    (over,) = world.tells("pressure-over")
    assert over.text.startswith("GPU 0: there is VRAM for tests again, after 9")
    assert world.out_of_memory == 0


@pytest.mark.parametrize("how", ["run", "skip", "fail"])
def test_pressure_without_end(how: str) -> None:
    """After the time-out `without_gpu` decides, and the reason has the figures."""
    world = pressed(without_gpu=how, pressure_timeout=20.0).run()
    reason = (
        "it needs 6.0 GB, and 2.0 GB was left on GPU 0 for 20 s "
        "(gpu_share_pressure_timeout_s), held by somebody"
    )
    if how == "run":
        (run,) = [
            a for a in world.actions if isinstance(a, Run) and a.worker == "gw1" and a.admissions
        ]
        assert run.admissions[1].note == f"ran without a GPU: {reason}"
        waited = run.admissions[1].waited
    else:
        assert refusals(world) == {
            1: (how, f"no GPU for this test: {reason} (gpu_share_without_gpu = {how})")
        }
        (waited,) = [
            action.admission.waited if isinstance(action, Admit) else action.admissions[1].waited
            for action in world.actions
            if (isinstance(action, Admit) and action.test == 1)
            or (isinstance(action, Run) and 1 in action.admissions)
        ]
    assert 20 <= waited < world.now < 60


@pytest.mark.parametrize("timeout", [0.0, 1.0, 5.0])
def test_short_time_out_holds_after_a_test_that_gave_back_as_much(timeout: float) -> None:
    """What is missing may be what a test gave back: that is not waited for any longer."""
    world = World(
        [gpu_test("a", 6), gpu_test("b", 6)],
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB)],
        [gpu_worker(0)],
        devices={GPU: Device(11 * GB, others=lambda at: 8 * GB if at >= 0.5 else 0)},
        policy=Policy()._replace(without_gpu="fail", pressure_timeout=timeout),
    ).run()
    (refused,) = refusals(world).values()
    assert f"was left on GPU 0 for {timeout:g} s" in refused[1]
    ended = world.admitted[0][0] + Script().duration
    assert timeout <= world.now - ended < timeout + 2
    assert world.out_of_memory == 0


def test_required_fails_whatever_without_gpu_says() -> None:
    """`required=True` under `without_gpu = skip`."""
    world = pressed(without_gpu="skip", pressure_timeout=5.0)
    world.dispatcher._jobs[1:2] = [gpu_test("b", 6, required=True)]  # type: ignore[index]
    world.run()
    ((outcome, reason),) = refusals(world).values()
    assert outcome == "fail"
    assert reason.endswith("(required=True)")


@pytest.mark.parametrize("by_pid", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_keeps_unseen_is_not_waited_for(by_pid: bool, workers: int) -> None:
    """A fixture keeps 1 GB in a worker whose tests need all of its slot."""
    world = World(
        [gpu_test(name) for name in "abcdefg"],
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB, context=CONTEXT)],
        [gpu_worker(number, 10 / workers) for number in range(workers)],
        scripts=dict.fromkeys(range(7), Script(keeps=GB, peak=2 * GB)),
        devices={GPU: Device(11 * GB)},
        by_pid=by_pid,
        counts=False,
    ).run()
    assert world.now < 10
    assert [action for action in world.actions if isinstance(action, Note)] == []


def test_what_others_take_later_is_not_what_a_worker_keeps_unseen() -> None:
    """Nobody attributes VRAM there: what a worker keeps is what was lacking after its test."""
    world = World(
        [gpu_test("a", 6), gpu_test("b", 3.5), gpu_test("c", 8)],
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB, context=CONTEXT)],
        [gpu_worker(0), gpu_worker(1)],
        devices={GPU: Device(11 * GB, others=lambda at: 7 * GB if 3 <= at < 60 else 0)},
        scripts={0: Script(keeps=GB), 1: Script(duration=5.0, peak=int(1.5 * GB))},
        by_pid=False,
        counts=False,
    ).run()
    starts = {test: at for at, _, test, _ in world.admitted}
    assert starts[2] >= 60
    assert world.out_of_memory == 0


def test_vram_that_comes_back_late() -> None:
    """It is waited for, and after the limit others are blamed."""
    for late, kinds in ((1.0, []), (10.0, ["late", "pressure-over"])):
        jobs = [gpu_test("a", 8), gpu_test("b", 8)]
        capacity = DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB)
        world = World(jobs, [capacity], [gpu_worker(0)], late=late).run()
        told = [a for a in world.actions if isinstance(a, Note)]
        assert [tell.kind for tell in told] == [kind for kind in kinds if kind == "late"]
        assert all(
            text.text == "GPU 0: 8.0 GB that tests gave back is not free yet" for text in told
        )
        assert world.out_of_memory == 0
    world = World(
        [gpu_test("a", 8), gpu_test("b", 8)],
        [DeviceCapacity(GPU, "GPU 0", 10 * GB, 0, GB, 11 * GB)],
        [gpu_worker(0)],
        late=50.0,
    ).run()
    late_again = world.tells("late")[-1].text
    assert late_again == "GPU 0: 6.0 GB did not come back within 30 s; held by somebody"
    assert [tell.kind for tell in world.actions if isinstance(tell, Note)] == [
        "late", "late", "pressure", "pressure-over",
    ]  # fmt: skip


# --- routing ---


def test_unmarked_tests_go_to_cpu_workers() -> None:
    """Where there are any; else to GPU workers with a whole slot each."""
    jobs = [Job("plain"), gpu_test("marked", 4)]
    made = dispatcher_of(jobs, [gpu_worker(0), Worker("gw1")])
    assert runs(made.step({}, 0)) == {"gw0": (1,), "gw1": (0,)}
    made = dispatcher_of(jobs, [gpu_worker(0, 4.5), gpu_worker(1, 4.5)], budget=9)
    found = {a.tests: a.admissions for a in made.step({}, 0) if isinstance(a, Run)}
    assert found == {
        (0,): {0: Admission(9 * GB // 2, "slot")},
        (1,): {1: Admission(4 * GB, "marker")},
    }


def test_gpu_workers_help_with_tests_that_last() -> None:
    """Once a test is known to last 0.5 s, an idle GPU worker takes the next ones."""
    jobs = [Job(f"t{n}") for n in range(10)]
    made = dispatcher_of(jobs, [gpu_worker(0), Worker("gw1")])
    assert runs(made.step({}, 0)) == {"gw1": (0, 1, 2, 3, 4)}
    made.finished("gw1", 0, None, 0.5)
    helped = runs(made.step({}, 1))
    assert helped["gw0"] == (5,)
    fast = dispatcher_of(jobs, [gpu_worker(0), Worker("gw1")])
    fast.step({}, 0)
    fast.finished("gw1", 0, None, 0.001)
    assert "gw0" not in runs(fast.step({}, 1))


def test_cpu_queues_are_as_deep_as_in_xdist() -> None:
    """400 tests, 4 workers: a quarter of a quarter first, more when less than that is left."""
    made = dispatcher_of([Job(f"t{n}") for n in range(400)], [Worker(f"gw{n}") for n in range(4)])
    first = made.step({}, 0)
    assert [len(a.tests) for a in first if isinstance(a, Run)] == [50, 43, 38, 33]
    assert made.finished("gw0", 0, None, 0.001) is False


def test_the_last_tests_of_cpu_workers() -> None:
    """With nothing left a worker that asks is told to end."""
    made = dispatcher_of([Job(f"t{n}") for n in range(3)], [Worker(f"gw{n}") for n in range(4)])
    found = [a for a in made.step({}, 0) if isinstance(a, Run)]
    assert [(a.worker, a.tests) for a in found] == [("gw0", (0,)), ("gw1", (1,)), ("gw2", (2,))]
    made.next_test_requested("gw0", 0, "end")
    assert made.step({}, 1) == [Shutdown("gw0")]


def test_a_cpu_worker_waits_for_what_may_come() -> None:
    """Nothing follows for it now, but a GPU test may have to do without a GPU later."""
    jobs = [gpu_test("a", 9), gpu_test("b", 9), Job("c")]
    made = dispatcher_of(jobs, [gpu_worker(0), Worker("gw1")])
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (2,)}
    made.next_test_requested("gw1", 2, "end")
    assert made.step({}, 1) == [Park("gw1")]
    made.finished("gw1", 2)
    made.worker_down("gw0")
    (run,) = made.step({}, 2)
    assert isinstance(run, Run)
    assert (run.worker, run.tests) == ("gw1", (1,))


def test_a_test_that_nobody_can_run_any_more() -> None:
    """It is dropped with a word: the run must end, and nothing is lost silently."""
    made = Dispatcher([gpu_test("a", 2), Job("b")], [DeviceCapacity(GPU, "GPU 0", 10 * GB)])
    made.worker_up(gpu_worker(0))
    made.worker_up(Worker("gw1"), {1})
    made.step({}, 0)
    made.worker_down("gw0")
    made.again(0)
    assert Drop(0, "no GPU worker is left that could run it") in made.step({}, 1)


def test_a_group_that_no_cpu_worker_has_collected_as_a_whole() -> None:
    """Under loadscope it is run all the same, by those who have collected its tests."""
    jobs = [Job("a", group="g"), Job("b", group="g"), Job("c", group="h"), Job("d", group="h")]
    made = Dispatcher(jobs, [], Policy(dist="loadscope"))
    for worker, collected in (("gw0", {0, 2}), ("gw1", {1, 3}), ("gw2", {0, 1, 2, 3})):
        made.worker_up(Worker(worker), collected)
    begun = [(a.worker, a.tests) for a in made.step({}, 0) if isinstance(a, Run) and a.tests]
    assert begun == [("gw2", (0, 1))]
    made.worker_down("gw2")
    found = [(a.worker, a.tests) for a in made.step({}, 1) if isinstance(a, Run) and a.tests]
    assert found == [("gw0", (2,)), ("gw1", (3, 1))]


@pytest.mark.parametrize("how", ["run", "skip"])
def test_gpu_test_that_only_cpu_workers_have_collected(how: str) -> None:
    """It goes to them from the start, with what is to become of it."""
    made = dispatcher_of([gpu_test("a", 9)], [Worker("gw1")], policy=Policy(without_gpu=how))
    made.worker_up(gpu_worker(0), set())
    (run,) = [a for a in made.step({}, 0) if isinstance(a, Run)]
    assert run.worker == "gw1"
    why = "no GPU worker has collected it"
    skipped = ("skip", f"no GPU for this test: {why} (gpu_share_without_gpu = skip)")
    assert run.admissions[0] == (
        Admission(note=f"ran without a GPU: {why}") if how == "run" else Admission(refusal=skipped)
    )


def test_no_gpu_worker_is_left() -> None:
    """What waited for a GPU runs on the CPU, with the reason."""
    made = dispatcher_of([gpu_test("a", 9), gpu_test("b", 9)], [gpu_worker(0), Worker("gw1")])
    made.step({}, 0)
    made.worker_down("gw0")
    (run,) = [a for a in made.step({}, 1) if isinstance(a, Run) and a.tests]
    assert run.admissions[1].note == "ran without a GPU: no GPU worker is left that could run it"


def test_a_worker_that_dies_before_it_begins() -> None:
    """What it was sent is dispatched anew, as the first of its group."""
    jobs = [gpu_test(f"t{n}", 1, group="g") for n in range(3)] + [Job("c"), Job("d")]
    policy = Policy(dist="loadscope")
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1), Worker("gw2")], policy=policy)
    first = runs(made.step({}, 0))
    assert (first["gw0"], first["gw2"]) == ((0,), (3, 4))
    assert made.worker_down("gw0", unsent={0}) is None
    assert [runs(made.step({}, 1))["gw1"]] == [(0,)]
    made.worker_up(Worker("gw3"))
    assert made.worker_down("gw2", unsent={3, 4}) is None
    assert runs(made.step({}, 3))["gw3"] == (3, 4)
    for number, (worker, test) in enumerate([("gw3", 3), ("gw3", 4), ("gw1", 0)]):
        made.finished(worker, test)
        made.step({}, 4 + number)
    for test in (1, 2):
        made.finished("gw1", test)
        made.step({}, 8 + test)
    assert made.is_done


def test_a_replacement_is_waited_for() -> None:
    """While one is on its way nothing is given up."""
    made = dispatcher_of([gpu_test("a", 9), gpu_test("b", 9)], [gpu_worker(0), Worker("gw1")])
    made.step({}, 0)
    made.worker_down("gw0", replaced=True)
    assert made.step({}, 1) == []
    made.worker_up(gpu_worker(2))
    assert runs(made.step({}, 2)) == {"gw2": (1,)}


# --- groups ---


def test_fixtures_of_a_module_are_set_up_once_unless_workers_would_be_idle() -> None:
    """Under load two modules go to two workers; a third worker takes half of one."""
    jobs = [gpu_test(f"{m}{n}", 1, group=m) for m in "ab" for n in range(8)]
    world = World(
        jobs, [DeviceCapacity(GPU, "GPU 0", 10 * GB)], [gpu_worker(n, 2) for n in range(2)]
    ).run()  # fmt: skip
    assert sorted(sorted(set(p.groups)) for p in world.processes.values()) == [["a"], ["b"]]
    world = World(
        jobs, [DeviceCapacity(GPU, "GPU 0", 10 * GB)], [gpu_worker(n, 2) for n in range(3)]
    ).run()  # fmt: skip
    switches = sum(
        1 for p in world.processes.values() for a, b in zip(["", *p.groups], p.groups, strict=False)
        if a != b
    )  # fmt: skip
    assert switches <= 5
    assert world.makespan <= 8


def test_a_group_that_no_worker_can_run_whole_is_split() -> None:
    """4 GB on the small device, 12 on the large one, one group: both run."""
    rooms = [DeviceCapacity(GPU, "GPU 0", 6 * GB), DeviceCapacity(OTHER, "GPU 1", 12 * GB)]
    jobs = [gpu_test("a", 12, group="g"), gpu_test("b", 4, devices=1, group="g")]
    world = World(
        jobs, rooms, [gpu_worker(0, 4), gpu_worker(1, 4, OTHER)], policy=Policy(dist="loadfile")
    ).run()
    assert sorted(world.outcomes) == [0, 1]


@pytest.mark.parametrize("values", [False, True])
def test_a_group_with_parametrised_fixtures_is_shared_forwards_alone(values: bool) -> None:
    """Who has run a later test would set a value up once more for an earlier one."""
    key = f"{IN_ORDER if values else ''}a"
    jobs = [gpu_test(f"t{n}", 1, group=key) for n in range(8)]
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)])
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (5,)}
    for test in (5, 6, 7):
        made.finished("gw1", test)
        found = runs(made.step({}, test))
        assert found == ({"gw1": (test + 1,)} if test < 7 else {} if values else {"gw1": (3,)})
    made.finished("gw0", 0)
    assert runs(made.step({}, 8))["gw0"] == (1,)


@pytest.mark.parametrize("reorder", [True, False])
def test_groups_in_their_own_order(reorder: bool) -> None:
    """As xdist: larger groups first, unless --no-loadscope-reorder; GPU groups alike."""
    jobs = [Job("a", group="a"), *(Job(f"b{n}", group="b") for n in range(3))]
    jobs += [gpu_test("c", 2, group="c"), gpu_test("d", 4, group="d")]
    policy = Policy(dist="loadscope", reorder=reorder)
    made = dispatcher_of(jobs, [gpu_worker(0), Worker("gw1")], policy=policy)
    found = runs(made.step({}, 0))
    expected = {"gw0": (5,), "gw1": (1, 2, 3)} if reorder else {"gw0": (4,), "gw1": (0, 1, 2, 3)}
    assert {worker: found[worker][:4] for worker in expected} == expected


# --- workers that ask ---


def test_the_next_test_takes_the_place_of_the_running_one() -> None:
    """6 GB fit in the worker that gives 6 back, though only 4 are left beside it."""
    jobs = [gpu_test("a", 6), gpu_test("b", 6), gpu_test("c", 6)]
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)])
    assert runs(made.step({}, 0)) == {"gw0": (0,)}
    made.next_test_requested("gw0", 0, "end")
    assert runs(made.step({}, 1)) == {"gw0": (1,)}
    # While its test is torn down nobody else gets what the next one needs.
    assert made._ledgers[GPU].limit_by_budget("gw1") == 4 * GB
    made.finished("gw0", 0)
    assert made._ledgers[GPU].limit_by_budget("gw1") == 4 * GB


def test_a_test_that_is_sent_meanwhile_is_the_answer() -> None:
    """A question about a test that is not the worker's last any more is old."""
    jobs = [Job(f"t{n}") for n in range(8)]
    made = dispatcher_of(jobs, [Worker("gw0"), Worker("gw1")])
    first = runs(made.step({}, 0))["gw0"]
    made.next_test_requested("gw0", first[-1] + 100, "end")
    assert made.step({}, 1) == []


def test_vram_that_must_come_back_first_is_waited_for() -> None:
    """9 of 10 GB after 9: reserved at once, admitted once the device shows them free."""
    jobs = [gpu_test("a", 9), gpu_test("b", 9)]
    made = dispatcher_of(jobs, [gpu_worker(0)])
    assert runs(made.step(free(10), 0)) == {"gw0": (0,)}
    made.next_test_requested("gw0", 0, "end")
    assert waiting(made.step(free(1, gw0=9), 1)) == {"gw0": 1}
    made.finished("gw0", 0, {GPU: 0})
    assert made.step({GPU: DeviceReading(2 * GB)}, 2) == []
    assert runs(made.step({GPU: DeviceReading(10 * GB)}, 3)) == {"gw0": (1,)}


def test_asked_at_the_start_nothing_is_reserved() -> None:
    """A worker that must know its next test before a long one keeps no VRAM for it."""
    jobs = [gpu_test("a", 4, duration=9), gpu_test("b", 6, duration=5), gpu_test("c", 5)]
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)], policy=Policy(reorder=False))
    first = runs(made.step({}, 0))
    ((test,),) = [tests for worker, tests in first.items() if worker == "gw0"][:1] or [(0,)]
    made.next_test_requested("gw0", test, "start")
    (sent,) = made.step({}, 1)
    assert isinstance(sent, Run)
    assert not sent.admitted
    assert made._ledgers[GPU].committed <= 10 * GB


def test_what_delays_nobody_may_pass() -> None:
    """9 GB wait for 6 that end at 10: 2 GB may start if they end by then, or fit beside."""
    jobs = [
        gpu_test("runs", 6, duration=10), gpu_test("short", 3, duration=1),
        gpu_test("waits", 9, duration=5), gpu_test("long", 2, duration=20),
        gpu_test("in time", 2, duration=8),
    ]  # fmt: skip
    policy = Policy(dist="loadscope", reorder=False)
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1), gpu_worker(2)], policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,)}
    made._gpu.pending.front().overtaken = 100  # type: ignore[union-attr]
    made.next_test_requested("gw1", 1, "end")
    assert waiting(made.step({}, 1)) == {"gw1": 2}
    made.finished("gw1", 1)
    assert runs(made.step({}, 1)) == {"gw2": (4,)}
    made.next_test_requested("gw2", 4, "end")
    assert waiting(made.step({}, 9)) == {"gw2": 3}
    made.finished("gw2", 4)
    assert made.step({}, 9) == []


def trivial(count: int, gigabytes: float = 2) -> list[Job]:
    return [gpu_test(f"t{n}", gigabytes, duration=0.012) for n in range(count)]


def test_short_tests_come_together() -> None:
    """Eight of 0.012 s are less than 0.1 s; more is asked for when the last of them starts."""
    made = dispatcher_of(trivial(100), [gpu_worker(0), gpu_worker(1)])
    found = [action for action in made.step({}, 0) if isinstance(action, Run)]
    assert [(len(run.tests), run.ahead) for run in found] == [(8, 5), (8, 5)]
    tests = found[0].tests
    for test in tests[:-1]:
        assert made.finished("gw0", test, None, 0.01) is False
    made.next_test_requested("gw0", tests[-1], "start")
    (more,) = made.step({}, 0.1)
    assert isinstance(more, Run)
    assert (len(more.tests), more.admitted) == (8, True)
    # The lease is the largest need, however many there are.
    assert made._ledgers[GPU].committed == 4 * GB


def test_only_tests_that_fit_are_sent_together() -> None:
    """After one of 4 GB beside 4 of 10: not one of 7, though it is short too."""
    jobs = [*trivial(1, 4), *trivial(1, 4), *trivial(20, 7), *trivial(20, 2)]
    policy = Policy(dist="loadscope", reorder=False)
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)], policy=policy)
    made._gpu.workers["gw0"].sent = []
    found = runs(made.step({}, 0))
    assert set(found["gw1"]) & set(range(2, 22)) == set()


def test_short_tests_behind_a_long_one_are_taken_back() -> None:
    """Twice their time is over, and the first still runs: the others go elsewhere."""
    made = dispatcher_of(trivial(40), [gpu_worker(0), gpu_worker(1)])
    tests = runs(made.step({}, 0))["gw0"]
    assert made.due_at == pytest.approx(0.2)
    assert Recall("gw0") in made.step({}, 0.3)
    made.returned("gw0", tests[2:])
    assert made.worker_down("gw0") == tests[0]
    pending = {test for unit in made._gpu.pending.all() for test in unit.tests}
    assert pending >= set(tests[1:])


def test_a_run_that_ends_early() -> None:
    """Nothing more is handed out; a bound test still runs once it fits, else it is given back."""
    jobs = [gpu_test("a", 6), gpu_test("b", 3), gpu_test("c", 9), gpu_test("d", 1)]
    policy = Policy(dist="loadscope", reorder=False)
    made = dispatcher_of(jobs[:3], [gpu_worker(0), gpu_worker(1)], policy=policy)
    assert runs(made.step({}, 0)) == {"gw0": (0,), "gw1": (1,)}
    made.next_test_requested("gw1", 1, "end")
    assert waiting(made.step({}, 1)) == {"gw1": 2}
    made.finished("gw1", 1)
    made.stop()
    assert made.step({}, 1) == []
    made.finished("gw0", 0, {GPU: 0})
    assert runs(made.step({}, 2)) == {"gw1": (2,)}
    made.finished("gw1", 2)
    assert made.step({}, 3) == []


def test_short_tests_of_a_group_that_are_taken_back_stay_in_order() -> None:
    """The worker goes on with its group where it was."""
    jobs = [job._replace(group="m.py") for job in trivial(40)]
    made = dispatcher_of(jobs, [gpu_worker(0), gpu_worker(1)], policy=Policy(dist="loadfile"))
    assert runs(made.step({}, 0)) == {"gw0": (0,)}
    made.next_test_requested("gw0", 0, "end")
    tests = runs(made.step({}, 0))["gw0"]
    made.finished("gw0", 0)
    assert len(tests) > 3
    assert Recall("gw0") in made.step({}, 0.3)
    made.returned("gw0", tests[2:])
    for test in tests[:2]:
        made.finished("gw0", test)
    assert runs(made.step({}, 1))["gw0"][0] == tests[2]


def test_one_worker_keeps_its_short_tests() -> None:
    """Nobody else could run them sooner."""
    made = dispatcher_of(trivial(40), [gpu_worker(0)])
    made.step({}, 0)
    assert made.due_at is None
    assert made.step({}, 9) == []


def test_one_worker_keeps_the_order_of_collection() -> None:
    """Needs, durations and groups that alternate change nothing: no order packs better."""
    jobs = [
        gpu_test("a", 1, duration=1.0, group="m0"),
        gpu_test("b", 6, duration=9.0, group="m1"),
        gpu_test("c", 3, group="m0"),
        gpu_test("d", 8, duration=2.0, group="m1"),
        gpu_test("e"),
    ]
    room = DeviceCapacity(GPU, "GPU 0", 10 * GB)
    world = World(jobs, [room], [gpu_worker(0)], scripts={n: Script(1.0) for n in range(5)})
    world.run()
    assert world.wrong == []
    assert [test for _, _, test, _ in world.admitted] == [0, 1, 2, 3, 4]
