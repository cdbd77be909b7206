"""Servers as neighbours: asked in time, planned for together, and watched by the scheduler."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import pytest_gpushare.neighbours as registry
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.dispatch.device_readings import DeviceReadings
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, HostFacts
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.neighbours import Neighbour, ServerFacts, ask_again, ask_all, owner_of
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts
from pytest_gpushare.planning.leasing import capacities_of
from pytest_gpushare.planning.plan import DeviceShare, LeasedByOthers, Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.scheduler.accounts import DeviceLedger
from pytest_gpushare.units import GB

from .test_dispatch_readings import Nvml
from .test_planning_sizing import DEFAULTS

SETTINGS = DEFAULTS._replace(enable_ollama_detection=False)


class Toy(Neighbour):
    """Holds 3 GB of the 6 GB that it is to have."""

    name = "Toy"
    limit = 0.3
    answer: Any = ServerFacts("toy:1", asked=True, answered=True, vram=3 * GB, keep=6 * GB)

    def ask(self, _settings: Settings, _environment: Mapping[str, str]) -> Any:
        return self.answer() if callable(self.answer) else self.answer

    def owns(self, pid: int) -> bool:
        return pid == os.getpid()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "SERVERS", (*registry.SERVERS, f"{__name__}:Toy"))
    registry.servers.cache_clear()
    yield
    registry.servers.cache_clear()


def test_all_are_asked() -> None:
    answers = ask_all(SETTINGS, {})
    assert list(answers) == [OLLAMA, "Toy"]
    assert answers["Toy"].vram == 3 * GB
    assert list(ask_again(SETTINGS, {}, {"Toy": answers["Toy"]})) == ["Toy"]


def test_one_that_hangs_or_fails_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start waits for its limit, and never sees its exception."""
    released = threading.Event()
    monkeypatch.setattr(Toy, "answer", released.wait)
    began = time.monotonic()
    answer = ask_all(SETTINGS, {})["Toy"]
    released.set()
    assert (answer.answered, answer.problem) == (False, "no answer within 0.3 s")
    assert time.monotonic() - began < 5

    monkeypatch.setattr(Toy, "answer", lambda *_: int("x"))
    assert ask_all(SETTINGS, {})["Toy"].problem.startswith("ValueError: invalid literal")


def test_processes_have_their_owner() -> None:
    assert (owner_of(os.getpid()), owner_of(2**31 - 1)) == ("Toy", "")


def device(*processes: GpuProcess, used: int = 3) -> Device:
    return Device("GPU-0", "a card", "0", 24 * GB, used * GB, (24 - used) * GB, processes)


def gpus(*devices: Device) -> GpuFacts:
    return GpuFacts(devices, devices)


def plan(facts: GpuFacts, answer: ServerFacts, others: LeasedByOthers = LeasedByOthers()) -> Any:  # noqa: B008
    answers = {OLLAMA: OllamaFacts(), "Toy": answer}
    return plan_run(SETTINGS, facts, answers, HostFacts(8), Request(), others=others)


def test_its_share() -> None:
    """What NVML lists of it counts as resident, else what it says itself."""
    (planned,) = plan(gpus(device()), Toy.answer).devices
    assert planned.shares == (
        DeviceShare(OLLAMA, 12 * GB, 0),
        DeviceShare("Toy", 6 * GB, 3 * GB),
    )
    assert planned.budget == (21 - 12 - 3 - 1) * GB
    listed = device(GpuProcess(1, 4 * GB, "Toy"), used=4)
    (planned,) = plan(gpus(listed), Toy.answer).devices
    assert planned.share_of("Toy") == DeviceShare("Toy", 6 * GB, 4 * GB)


def test_on_another_host_or_silent() -> None:
    """Nothing is kept for it, but what its processes hold is its own."""
    for answer in (
        Toy.answer._replace(on_this_host=False),
        ServerFacts("toy:1", asked=True, problem="nothing listens there"),
    ):
        (planned,) = plan(gpus(device()), answer).devices
        assert planned.share_of("Toy") == DeviceShare("Toy", 0, 0)


def test_several_devices() -> None:
    """While its device is unknown it may use each; else the one with its processes."""
    one = device()
    two = Device("GPU-1", "a card", "1", 24 * GB, 0, 24 * GB, ())
    kept = [d.share_of("Toy").reservation for d in plan(gpus(one, two), Toy.answer).devices]
    assert kept == [6 * GB, 6 * GB]
    listed = device(GpuProcess(1, 3 * GB, "Toy"))
    kept = [d.share_of("Toy").reservation for d in plan(gpus(listed, two), Toy.answer).devices]
    assert kept == [6 * GB, 0]


def test_the_sum_of_another_session_counts() -> None:
    """It keeps 20 GB in all, this one 12 for Ollama and 6: the rest is added once."""
    (planned,) = plan(gpus(device()), Toy.answer, LeasedByOthers({}, {"GPU-0": 20 * GB})).devices
    assert planned.reservation == 20 * GB
    assert planned.share_of(OLLAMA).reservation == 14 * GB
    (planned,) = plan(gpus(device()), Toy.answer, LeasedByOthers({}, {"GPU-0": 9 * GB})).devices
    assert planned.reservation == 18 * GB


def test_what_one_holds_beyond_its_reservation_is_not_the_others() -> None:
    """Ollama holds 14 of 12 GB: what Toy has not yet taken stays free all the same."""
    made = plan(gpus(device(used=0)), ServerFacts("toy:1", True, True, keep=4 * GB))
    (capacity,) = capacities_of(made)
    assert (capacity.reservation, capacity.beside) == (12 * GB, 4 * GB)
    live = LiveVram(Nvml(GpuProcess(7, 14 * GB, OLLAMA)))
    (planned,) = made.devices
    readings = DeviceReadings(live, ["GPU-0"], shares={"GPU-0": planned.shares[1:]})
    (reading,) = readings.now().values()
    live.close()
    assert (reading.resident, reading.outstanding) == (14 * GB, 4 * GB)
    ledger = DeviceLedger(capacity)
    ledger.read(reading)
    assert ledger.kept == (4 + 1) * GB
