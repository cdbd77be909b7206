"""The CPU workers' queues."""

from __future__ import annotations

import pytest

from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.types import Action, Job, Policy, Run, Shutdown, Worker

TESTS = 6


@pytest.mark.parametrize("seconds", [0.001, 1.0])
@pytest.mark.parametrize("dist", ["load", "worksteal"])
def test_who_asks_gets_what_is_left(dist: str, seconds: float) -> None:
    """However long tests last: one that knows no next test tears its wider fixtures down."""
    pool = CpuPool([Job(f"t.py::t{number}") for number in range(TESTS)], Policy(dist))
    queue: list[int] = []
    ran: list[int] = []

    def take(actions: list[Action]) -> None:
        for each in actions:
            assert isinstance(each, Run), each
            queue.extend(each.tests)

    pool.up(Worker("gw0"), None)
    pool.add(range(TESTS))
    take(list(pool.refill(more_may_come=True)))
    while queue:
        ran.append(queue.pop(0))
        if not queue:
            pool.next_test_requested("gw0", ran[-1])
            answers = list(pool.refill(more_may_come=False))
            if len(ran) == TESTS:
                assert answers == [Shutdown("gw0")]
                break
            take(answers)
        pool.finished("gw0", ran[-1], seconds)
        take(list(pool.refill(more_may_come=True)))
    assert ran == list(range(TESTS))
