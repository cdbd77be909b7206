"""A running test that acquires more VRAM than its need says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gpushare.leases import LeaseUnavailable
from pytest_gpushare.scheduler.dispatcher import Dispatcher
from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import (
    Action,
    Admit,
    DeviceCapacity,
    DeviceReading,
    Job,
    Others,
    Raised,
    Run,
    Worker,
)
from pytest_gpushare.units import GB
from pytest_gpushare.wire import Link
from pytest_gpushare.worker.runner import RaisedNeed

GPU = "GPU-0"


def dispatcher_of(*needs: int) -> Dispatcher:
    """Two workers on a device of 10 GB."""
    jobs = [Job(f"t{n}", True, Need(need * GB, source="marker")) for n, need in enumerate(needs)]
    made = Dispatcher(jobs, [DeviceCapacity(GPU, "GPU 0", 10 * GB)])
    for number in range(2):
        made.worker_up(Worker(f"gw{number}", (GPU,), 5 * GB))
    return made


def reading(free: int, **held: int) -> dict[str, DeviceReading]:
    sizes: dict[str, int | None] = {worker: size * GB for worker, size in held.items()}
    return {GPU: DeviceReading(free * GB, 0, sizes, "blender 1.0 GB")}


def started(actions: list[Action]) -> set[int]:
    found = [a.tests for a in actions if isinstance(a, Run) and a.admitted]
    return {t for tests in found for t in tests} | {a.test for a in actions if isinstance(a, Admit)}


def raised(actions: list[Action]) -> list[Raised]:
    return [action for action in actions if isinstance(action, Raised)]


def test_there_is_enough() -> None:
    """The need counts as raised from then on, for this session and for the others."""
    made = dispatcher_of(2, 3, 4)
    assert started(made.step(reading(10), 0.0)) == {1, 2}
    worker = next(w for w in made._gpu.workers.values() if w.sent == [1])
    made.wants_more(worker.id, 7, 5 * GB)
    assert raised(made.step(reading(10), 1.0)) == [Raised(worker.id, 7, True, 5 * GB)]
    assert made.shares()[GPU].committed == 9 * GB
    assert started(made.step(reading(10), 2.0)) == set()
    # It gives the VRAM back while its test goes on; its need stays.
    made.wants_more(worker.id, 8, 0)
    made.step(reading(10), 3.0)
    assert made.shares()[GPU].committed == 7 * GB


def test_waits_for_the_tests_beside_it_and_none_begins_meanwhile() -> None:
    made = dispatcher_of(6, 3, 1, 1)
    assert started(made.step(reading(10), 0.0)) == {0, 1}
    worker = next(w.id for w in made._gpu.workers.values() if w.sent == [1])
    other = next(w.id for w in made._gpu.workers.values() if w.sent == [0])
    made.wants_more(worker, 1, 8 * GB)
    text = "4.0 GB is left for it on GPU 0; held by blender 1.0 GB"
    assert raised(made.step(reading(10), 1.0)) == [
        Raised(worker, 1, False, is_final=False, text=text)
    ]
    assert made.due_at is not None
    assert raised(made.step(reading(10), 2.0)) == []
    made.finished(other, 0, {GPU: 0})
    actions = made.step(reading(10), 3.0)
    assert raised(actions) == [Raised(worker, 1, True, 8 * GB)]
    # 8 of 10 are taken.
    assert len(started(actions)) <= 1
    made.finished(worker, 1, {GPU: 0})
    assert made.shares()[GPU].committed <= 2 * GB


def test_other_sessions_are_asked_for_it() -> None:
    """The wish is a place in their queue, as that of a test which has not begun."""
    made = dispatcher_of(2)
    made.step(reading(10), 0.0)
    (worker,) = [w.id for w in made._gpu.workers.values() if w.sent]
    made.wants_more(worker, 1, 9 * GB)
    made.step(reading(5), 1.0)
    share = made.shares()[GPU]
    assert (share.waits_for, share.want) == (0, 7 * GB)


def test_more_than_there_ever_is() -> None:
    made = dispatcher_of(2)
    made.step(reading(10), 0.0)
    (worker,) = [w.id for w in made._gpu.workers.values() if w.sent]
    made.wants_more(worker, 1, 11 * GB)
    text = "the largest budget is 10.0 GB (GPU 0)"
    assert raised(made.step(reading(10), 1.0)) == [Raised(worker, 1, False, text=text)]


def test_as_much_as_other_sessions_leave() -> None:
    """For a test that ran out of memory and runs once more, alone."""
    made = dispatcher_of(2)
    made.step(reading(10), 0.0)
    (worker,) = [w.id for w in made._gpu.workers.values() if w.sent]
    made.wants_more(worker, 1, 10 * GB, takes_less=True)
    beside = reading(9)[GPU]._replace(others=Others(claimed=3 * GB))
    assert raised(made.step({GPU: beside}, 1.0)) == [Raised(worker, 1, True, 6 * GB)]
    assert made.shares()[GPU].committed == 6 * GB


def test_wish_of_a_test_that_is_over() -> None:
    made = dispatcher_of(2, 9)
    made.step(reading(10), 0.0)
    worker = next(w.id for w in made._gpu.workers.values() if w.sent)
    (test,) = made._gpu.workers[worker].sent
    made.wants_more(worker, 1, 10 * GB)
    made.finished(worker, test, {GPU: 0})
    assert raised(made.step(reading(10), 1.0)) == []
    assert not made._gpu.raising


class Controller:
    """Answers as it is told to."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers, self.asked = list(answers), list[tuple[int, int]]()
        self.link = Link(lambda _: None)

    def ask(self, number: int, size: int, takes_less: bool) -> None:
        self.asked.append((number, size))
        self.takes_less = takes_less
        while self.answers and self.answers[0]["number"] == number:
            self.link.receive(("raised", self.answers.pop(0)))


def answer(number: int, granted: bool, is_final: bool = True, text: str = "") -> dict[str, Any]:
    return {"number": number, "granted": granted, "is_final": is_final, "text": text}


def of(controller: Controller) -> Callable[[int, float | None], Any]:
    return RaisedNeed(controller.link.on, controller.ask)


def test_blocks_within_blocks_add_up() -> None:
    controller = Controller(answer(1, False, False, "busy"), answer(1, True), answer(2, True))
    acquire = of(controller)
    with acquire(5 * GB, 10.0), acquire(2 * GB, 10.0):
        pass
    assert [size // GB for _, size in controller.asked] == [5, 7, 5, 0]


@pytest.mark.parametrize("is_final", [True, False])
def test_refused(is_final: bool) -> None:
    """At once where it can never be had, else when the time is over; nothing stays raised."""
    controller = Controller(answer(1, False, is_final, "3.0 GB is left for it on GPU 0"))
    began = time.monotonic()
    with (
        pytest.raises(
            LeaseUnavailable, match=r"5\.0 GB of VRAM is not available .* 3\.0 GB is left"
        ),
        of(controller)(5 * GB, 30.0 if is_final else 0.2),
    ):
        pass
    assert time.monotonic() - began < 5
    assert controller.asked[-1][1] == 0


def test_as_much_as_there_is() -> None:
    controller = Controller({**answer(1, True), "size": 6 * GB})
    assert RaisedNeed(controller.link.on, controller.ask).most(9 * GB) == 6 * GB
