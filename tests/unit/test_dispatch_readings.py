"""What the dispatcher is told of devices, and how seldom NVML is asked for it."""

from __future__ import annotations

import os
import threading
import time

import pytest
from simulator.child import wait_for

from pytest_gpushare.dispatch.device_readings import SOONEST, AllReadings, DeviceReadings
from pytest_gpushare.dispatch.executor import Timer
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.ollama.models import OLLAMA
from pytest_gpushare.units import GB


class Nvml:
    """One device; counts how often it is read."""

    def __init__(self, *processes: GpuProcess) -> None:
        self.held = processes
        self.memories = self.lists = 0

    def memory(self) -> dict[str, Memory]:
        self.memories += 1
        return {"GPU-0": Memory(24 * GB, 4 * GB, 20 * GB)}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        self.lists += 1
        return {"GPU-0": self.held}


def test_who_holds_what() -> None:
    """Workers by PID with their descendants, Ollama, and the others by name."""
    nvml = Nvml(
        GpuProcess(os.getpid(), 2 * GB),
        GpuProcess(2**22 + 1, GB),
        GpuProcess(2**22 + 2, 10 * GB, neighbour="Ollama"),
    )
    live = LiveVram(nvml)
    readings = DeviceReadings(live, ["GPU-0", "GPU-1"])
    # This process descends from its parent: that one is the worker here.
    readings.workers[os.getppid()] = "gw0"
    found = readings.now()
    live.close()
    assert found["GPU-0"].held == {"gw0": 2 * GB}
    assert found["GPU-0"].free == 20 * GB
    assert found["GPU-0"].resident == 10 * GB
    assert found["GPU-0"].holders == (
        f"Ollama 10.0 GB, PID {2**22 + 1} 1.0 GB, processes that tests of gw0 started 2.0 GB"
    )
    assert found["GPU-0"].left_behind == {"gw0": 2 * GB}
    assert found["GPU-1"].free is None


def test_read_seldom() -> None:
    """However many ask, NVML is read once in 50 ms; after a report once more, but not at once."""
    nvml = Nvml(GpuProcess(os.getpid(), GB))
    clock = [100.0]
    live = LiveVram(nvml, lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], clock=lambda: clock[0])
    readings.workers[os.getpid()] = "gw0"
    for _ in range(50):
        assert readings.now()["GPU-0"].held == {"gw0": GB}
    assert (nvml.memories, nvml.lists) == (1, 1)
    clock[0] += 0.01
    readings.has_reported("gw0")
    clock[0] += 0.005
    # Too soon to ask again: what it holds now is unknown, not what it held before.
    assert readings.now()["GPU-0"].held == {"gw0": None}
    assert nvml.lists == 1
    clock[0] += 0.02
    assert readings.now()["GPU-0"].held == {"gw0": GB}
    assert (nvml.memories, nvml.lists) == (2, 2)
    live.close()


def test_free_is_never_older_than_the_processes() -> None:
    """Else what a test took in between would count as free, and as taken by nobody."""
    nvml = Nvml(GpuProcess(os.getpid(), GB))
    clock = [100.0]
    live = LiveVram(nvml, lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], clock=lambda: clock[0])
    readings.now()
    clock[0] += 0.99
    live.memory(0.0)
    clock[0] += 0.02
    # The memory is fresh enough by itself, but the processes are read anew.
    readings.now()
    assert (nvml.lists, nvml.memories) == (2, 3)
    live.close()


@pytest.mark.parametrize("hosts", [1, 2])
def test_what_is_read_when_a_worker_asks_for_its_next_test(hosts: int) -> None:
    """What a test has taken since the processes were listed would be missing twice: there, and in
    what is free. The report that follows is seen as soon as it would be without."""
    nvml = Nvml(GpuProcess(os.getpid(), GB))
    clock = [100.0]
    live = LiveVram(nvml, lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], clock=lambda: clock[0])
    if hosts == 2:
        readings = AllReadings([readings, DeviceReadings(None, ())])
    readings.workers[os.getpid()] = "gw0"
    readings.now()
    nvml.held = (GpuProcess(os.getpid(), 3 * GB),)
    clock[0] += 0.2
    assert readings.now()["GPU-0"].held == {"gw0": GB}
    readings.require_current()
    assert readings.now()["GPU-0"].held == {"gw0": 3 * GB}
    nvml.held = (GpuProcess(os.getpid(), 2 * GB),)
    clock[0] += 0.001
    readings.has_reported("gw0")
    assert readings.now()["GPU-0"].held == {"gw0": 2 * GB}
    assert nvml.lists == 3
    clock[0] += 0.001
    readings.require_current()
    readings.now()
    assert nvml.lists == 3
    live.close()


def test_who_is_not_in_the_list_holds_nothing() -> None:
    """Once the driver has named a worker; a list that names none may be one of another host."""
    nvml = Nvml(GpuProcess(2**22 + 1, GB))
    clock = [100.0]
    live = LiveVram(nvml, lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], clock=lambda: clock[0])
    readings.workers.update({os.getpid(): "gw0", 2**22 + 2: "gw1"})
    assert readings.now()["GPU-0"].held == {}
    nvml.held = (GpuProcess(os.getpid(), GB),)
    clock[0] += 2
    readings.now()
    clock[0] += 2
    assert readings.now()["GPU-0"].held == {"gw0": GB, "gw1": 0}
    clock[0] += 0.01
    readings.has_reported("gw1")
    assert readings.now()["GPU-0"].held == {"gw0": GB, "gw1": None}
    nvml.held = ()
    clock[0] += 2
    assert readings.now()["GPU-0"].held == {"gw0": 0, "gw1": 0}
    live.close()


def test_when_a_report_can_be_seen() -> None:
    """A test that is over just after a reading is looked for as soon as one is allowed again."""
    clock = [100.0]
    live = LiveVram(Nvml(GpuProcess(os.getpid(), GB)), lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], clock=lambda: clock[0])
    readings.workers[os.getpid()] = "gw0"
    readings.now()
    assert readings.due_at == float("inf")
    clock[0] += 0.005
    readings.has_reported("gw0")
    readings.now()
    assert readings.due_at == pytest.approx(100.0 + SOONEST)
    clock[0] = 100.0 + SOONEST + 0.001
    readings.now()
    assert readings.due_at == float("inf")
    live.close()


def test_nobody_to_ask() -> None:
    """Under a what-if there is nothing to read."""
    assert DeviceReadings(None, ["GPU-0"]).now() == {}


@pytest.mark.parametrize("waits", [True, False])
def test_timer(waits: bool) -> None:
    """It wakes while a step is due, and ends when it is told."""
    woken: list[float] = []
    timer = Timer(lambda: 0.0 if waits else None, lambda: woken.append(time.monotonic()))
    timer.start()
    if waits:
        wait_for(lambda: woken)
    timer.stop()
    count = len(woken)
    time.sleep(0.06)
    assert bool(woken) == waits
    assert len(woken) == count


def test_timer_sleeps_until_a_step_may_be_due() -> None:
    """Where none is due it does not even look, until somebody says that one may be."""
    looks: list[float] = []
    woken = threading.Event()
    due_at: float | None = None

    def look() -> float | None:
        looks.append(time.monotonic())
        return None if due_at is None else max(0.0, due_at - time.monotonic())

    timer = Timer(look, woken.set)
    timer.start()
    wait_for(lambda: looks)
    time.sleep(0.1)
    assert len(looks) == 1
    due_at = time.monotonic() + 0.05
    assert not woken.wait(0.1)
    timer.look()
    assert woken.wait(5)
    timer.stop()


def test_the_same_answer_as_long_as_nothing_changes() -> None:
    """Sixteen devices need not be gone through for each test; a report makes a new answer."""
    clock = [100.0]
    resident = {OLLAMA: {"GPU-0": GB}}
    live = LiveVram(Nvml(GpuProcess(os.getpid(), GB)), lambda: clock[0])
    readings = DeviceReadings(live, ["GPU-0"], lambda: resident, clock=lambda: clock[0])
    readings.workers[os.getpid()] = "gw0"
    first = readings.now()
    assert readings.now() is first
    resident[OLLAMA]["GPU-0"] = 2 * GB
    second = readings.now()
    assert (first["GPU-0"].resident, second["GPU-0"].resident) == (GB, 2 * GB)
    readings.workers[os.getppid()] = "gw1"
    third = readings.now()
    assert third is not second
    clock[0] += 0.01
    readings.has_reported("gw0")
    assert readings.now()["GPU-0"].held["gw0"] is None
    assert third["GPU-0"].held["gw0"] == GB
    live.close()
