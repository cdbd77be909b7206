"""A worker's readings of itself: seldom enough, and never a wait for a driver that hangs."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from simulator.child import wait_for

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.units import GB
from pytest_gpushare.wire import Link
from pytest_gpushare.worker import counters
from pytest_gpushare.worker.memory import PATIENCE, OwnVram


class Driver:
    """One device; counts how often its processes are listed."""

    def __init__(self, *processes: GpuProcess) -> None:
        self.held: tuple[GpuProcess, ...] | None = processes
        self.lists = 0
        self.hangs = threading.Event()
        self.goes_on = threading.Event()

    def memory(self) -> dict[str, Memory]:
        return {}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        self.lists += 1
        if self.hangs.is_set():
            self.goes_on.wait(30)
        return {"GPU-0": self.held}


OWN = GpuProcess(os.getpid(), 3 * GB)


class Worker:
    """A worker of so many on the device, with a clock of its own."""

    def __init__(self, driver: Driver, workers: int = 1) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.now = 100.0
        self.live = LiveVram(driver, timeout=PATIENCE)
        self.own = OwnVram(
            "GPU-0", workers, Link(self.sent.append), live=self.live, clock=lambda: self.now
        )


def test_what_is_sent() -> None:
    """This process with its descendants, others left out."""
    driver = Driver(OWN, GpuProcess(2**22 + 1, 5 * GB))
    worker = Worker(driver)
    worker.own.look("test_a")
    worker.live.close()
    ((kind, told),) = worker.sent
    assert (kind, told["nodeid"], told["held"]) == ("own", "test_a", 3 * GB)


@pytest.mark.parametrize("held", [(), (GpuProcess(2**22 + 1, GB),), (OWN._replace(used=None),)])
def test_nothing_is_sent_of_what_is_unknown(held: tuple[GpuProcess, ...]) -> None:
    """In a container this process has another number there, or no size."""
    worker = Worker(Driver(*held))
    worker.own.look("test_a")
    worker.live.close()
    assert worker.sent == []


def test_at_most_20_a_second() -> None:
    """Over all workers of the device, those of tests that ran out of memory among them."""
    driver = Driver(OWN)
    workers = [Worker(driver, 3) for _ in range(3)]
    for step in range(1000):
        for worker in workers:
            worker.now = 100 + step / 100
            worker.own.look("test_a", urgent=step % 7 == 0)
    for worker in workers:
        worker.live.close()
    assert 150 <= driver.lists <= 200 + 6


def test_seldom_while_nothing_is_held() -> None:
    """Most tests use no GPU: four readings a second are enough to see that."""
    driver = Driver()
    worker = Worker(driver)
    for step in range(200):
        worker.now = 100 + step / 100
        worker.own.look("test_a")
    worker.live.close()
    assert 7 <= driver.lists <= 9


def test_counters_know_better(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(OWN)
    worker = Worker(driver)
    monkeypatch.setattr(counters, "counts", lambda: {("torch", 0): counters.Count(1, 1, 1, 1)})
    worker.own.look("test_a")
    assert (driver.lists, worker.sent) == (0, [])


def test_a_driver_that_hangs_is_waited_for_once() -> None:
    """Until its answer is there; then it is believed again."""
    driver = Driver(OWN)
    driver.hangs.set()
    worker = Worker(driver)
    began = time.monotonic()
    for _ in range(50):
        worker.now += 1
        worker.own.look("test_a")
    assert time.monotonic() - began < 4 * PATIENCE
    assert (driver.lists, worker.sent) == (1, [])
    driver.hangs.clear()
    driver.goes_on.set()

    def look() -> object:
        worker.now += 1
        worker.own.look("test_b")
        return worker.sent

    wait_for(look)
    worker.live.close()
    assert worker.sent[0][1]["nodeid"] == "test_b"
