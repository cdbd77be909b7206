"""The order in which one worker runs the tests, also after it has died: that of xdist's `load`."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from dispatching import Script, World
from xdist.scheduler.load import LoadScheduling

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.queue import LoadOrder
from pytest_gpushare.scheduler.types import DeviceCapacity, Job, Worker
from pytest_gpushare.units import GB


class Node:
    """A worker as xdist's scheduler sees it."""

    shutting_down = False

    def __init__(self) -> None:
        self.tests: list[int] = []

    def send_runtest_some(self, tests: list[int]) -> None:
        self.tests += tests

    def shutdown(self) -> None:
        self.shutting_down = True


def load(count: int, chunk: int | None) -> tuple[LoadScheduling, list[str]]:
    """xdist's own scheduler for one worker, without a session."""
    sched: Any = LoadScheduling.__new__(LoadScheduling)
    sched.numnodes, sched.collection, sched.pending = 1, None, []
    sched.node2collection, sched.node2pending = {}, {}
    sched.maxschedchunk, sched.config = chunk, None
    sched.log = lambda *_: None
    return sched, [str(number) for number in range(count)]


def join(sched: Any, ids: list[str]) -> Node:
    """A worker has collected."""
    node = Node()
    sched.add_node(node)
    sched.add_node_collection(node, ids)
    sched.schedule()
    return node


@pytest.mark.parametrize("seed", range(60))
def test_order_beside_xdist(seed: int) -> None:
    """Whatever kills the worker, how long tests last, and where a plugin runs one once more."""
    draw = Random(seed)
    count, chunk = draw.choice([1, 2, 3, draw.randint(4, 90)]), draw.choice([None, None, 1, 2, 5])
    sched, ids = load(count, chunk)
    node = join(sched, ids)
    mine, left = LoadOrder(range(count), chunk), list(range(count))
    while left:
        test, expected = left.pop(0), node.tests.pop(0)
        assert test == expected
        if draw.random() < 0.1:
            assert sched.remove_node(node) == str(test)
            places = mine.down(test)
            assert sorted(places) == sorted(left)
            left.sort(key=places.__getitem__)
            if draw.random() < 0.3:
                sched.mark_test_pending(str(test))
                mine.again(test)
                left.insert(0, test)
            node = join(sched, ids)
            mine.up()
        else:
            duration = draw.choice([0.01, 0.2])
            mine.done(test, duration)
            sched.mark_test_complete(node, test, duration)


@pytest.mark.parametrize("group", ["", "shared"])
@pytest.mark.parametrize("duration", [0.005, 0.04, 0.3])
def test_order_of_the_dispatcher(duration: float, group: str) -> None:
    """One worker that dies runs the tests so, whether they were sent together or one by one."""
    count, deaths = 40, (1, 9, 10, 30)
    expected, order = list[int](), LoadOrder(range(count), None)
    left = list(range(count))
    while left:
        test = left.pop(0)
        expected.append(test)
        if test in deaths:
            left.sort(key=order.down(test).__getitem__)
            order.up()
        else:
            order.done(test, duration)
    need = Need(GB, source="marker")
    world = World(
        [Job(f"t{number}", True, need, group) for number in range(count)],
        [DeviceCapacity("GPU-0", "GPU 0", 8 * GB)],
        [Worker("gw0", ("GPU-0",), 8 * GB)],
        scripts={n: Script(duration, crashes=n in deaths) for n in range(count)},
    ).run()
    assert list(world.outcomes) == expected
