"""The dispatcher: which test goes where and when, with figures."""

from __future__ import annotations

from pytest_gpushare.plan.dispatcher import Dispatcher
from pytest_gpushare.plan.needs import Need
from pytest_gpushare.plan.work import Instead, Job, Reading, Room, Run, Shutdown, Worker
from pytest_gpushare.units import GB

GPU = "GPU-0"


def gpu_test(name: str, gigabytes: float | None = None) -> Job:
    vram = None if gigabytes is None else int(gigabytes * GB)
    return Job(name, marked=True, need=Need(vram, source="marker" if vram else "slot"))


def gpu_worker(number: int, slot: float = 4.5) -> Worker:
    return Worker(f"gw{number}", (GPU,), int(slot * GB))


def test_two_that_fit_and_one_that_waits() -> None:
    """Of 6, 6 and 4 GB on 10 GB the first and the third run; the second follows."""
    dispatcher = Dispatcher(
        [gpu_test("a", 6), gpu_test("b", 6), gpu_test("c", 4)], [Room(GPU, "GPU 0", 10 * GB)]
    )
    for number in range(2):
        dispatcher.worker_up(gpu_worker(number))
    assert dispatcher.step({GPU: Reading(24 * GB)}, 0) == [
        Run("gw0", (0,), need=6 * GB, source="marker"),
        Run("gw1", (2,), need=4 * GB, source="marker"),
    ]
    dispatcher.finished("gw1", 2)
    assert dispatcher.step({GPU: Reading(14 * GB)}, 1) == []
    dispatcher.finished("gw0", 0)
    (run,) = dispatcher.step({GPU: Reading(24 * GB)}, 2)
    assert isinstance(run, Run)
    assert run.tests == (1,)
    dispatcher.finished(run.worker, 1)
    assert dispatcher.is_done
    assert dispatcher.step({}, 3) == [Shutdown("gw0"), Shutdown("gw1")]


def test_a_need_that_no_device_can_meet() -> None:
    """It fails by name, with the figures; the others run."""
    dispatcher = Dispatcher(
        [gpu_test("huge", 40), gpu_test("small", 4)], [Room(GPU, "GPU 0", 10 * GB)]
    )
    dispatcher.worker_up(gpu_worker(0))
    (refused,) = dispatcher.step({}, 0)
    assert isinstance(refused, Instead)
    assert "40.0 GB" in refused.reason
    assert "10.0 GB" in refused.reason
    dispatcher.finished("gw0", 0)
    (run,) = dispatcher.step({}, 0)
    assert isinstance(run, Run)
    assert run.tests == (1,)
