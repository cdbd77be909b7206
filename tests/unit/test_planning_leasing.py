"""The plan beside other sessions: one that is at its end is waited for, any other is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from pytest_gpushare.gpu.devices import GpuFacts, HostFacts, simulated
from pytest_gpushare.leases.ledger import Ledger
from pytest_gpushare.leases.lessee import Lessee
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, SessionWorker
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts
from pytest_gpushare.planning.leasing import Agreed, Terms, agree
from pytest_gpushare.planning.plan import LeasedByOthers, Plan, Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.units import GB

from .test_planning_sizing import DEFAULTS

SETTINGS = DEFAULTS._replace(
    ollama_vram_reservation=Fraction(0),
    enable_ollama_detection=False,
    max_workers_per_gb=Fraction(0),
    min_vram_per_worker=Fraction(10 * GB),
)
GPUS = simulated(("24GB:used=2GB",))
(DEVICE,) = GPUS.devices
WORKER = SessionWorker("gw0", 1, "gpu", DEVICE.uuid, 10 * GB)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lessee]:
    """Another session, which has leased so much that one worker has room beside it."""
    record = LeaseRecord(1, devices={DEVICE.uuid: DeviceLease(10 * GB)}, total=4, workers=(WORKER,))
    lessee = Lessee(Ledger(tmp_path), record, {DEVICE.uuid: DEVICE.total}, None)
    assert lessee.change()
    yield lessee
    lessee.close()


def agreed(directory: Path, wait: str | None = None) -> Agreed:
    settings = SETTINGS._replace(
        leases=str(directory), wait=None if wait is None else Fraction(wait)
    )

    def make(gpus: GpuFacts, others: LeasedByOthers) -> Plan:
        answers = {OLLAMA: OllamaFacts()}
        return plan_run(settings, gpus, answers, HostFacts(8), Request(), others=others)

    found = agree(settings, GPUS, None, make, Terms(directory))
    assert found.lessee is not None
    found.lessee.close()
    leased = found.lessee.record
    assert not leased.ticket
    return found


def test_session_at_its_end_is_waited_for(tmp_path: Path, other: Lessee) -> None:
    """Two workers in a moment rather than one now, which would be the run's for good."""
    other.change(done=4)
    timer = threading.Timer(0.3, other.leave)
    timer.start()
    assert len(agreed(tmp_path).plan.slots) == 2
    timer.join(5)


def test_session_without_workers_left_is_at_its_end(tmp_path: Path, other: Lessee) -> None:
    other.change(done=1, workers=())
    timer = threading.Timer(0.3, other.leave)
    timer.start()
    assert len(agreed(tmp_path).plan.slots) == 2
    timer.join(5)


@pytest.mark.parametrize(("done", "wait", "least"), [(4, "0.4", 0.4), (4, "0", 0), (3, None, 0)])
def test_and_not_for_long(
    tmp_path: Path, other: Lessee, done: int, wait: str | None, least: float
) -> None:
    """Then the session starts with what is left; beside one with tests left it does at once."""
    other.change(done=done)
    began = time.monotonic()
    assert len(agreed(tmp_path, wait).plan.slots) == 1
    assert least <= time.monotonic() - began < least + 2


@pytest.mark.parametrize(("wait", "slots", "least"), [(None, 2, 0.3), ("0.4", 1, 0.4), ("0", 1, 0)])
def test_earlier_one_that_is_about_to_start(
    tmp_path: Path, other: Lessee, wait: str | None, slots: int, least: float
) -> None:
    """It starts first, also where there is room for both; unless there is no time for that."""
    share = {DEVICE.uuid: DeviceLease(0, 10 * GB)}

    def renew() -> None:
        other.change(devices=share, ticket=1, renewed=time.monotonic())

    renew()
    timer = threading.Timer(0.3 if wait is None else 5.0, other.leave)
    began = time.monotonic()
    timer.start()
    assert len(agreed(tmp_path, wait).plan.slots) == slots
    assert least <= time.monotonic() - began < least + 2
    timer.cancel()


def test_leaves_a_session_its_largest_test_whenever_it_was_started(
    tmp_path: Path, other: Lessee
) -> None:
    """By the test it leases first, so it goes first: else both would wait for each other."""
    share = DeviceLease(GB, most=20 * GB)
    other.change(devices={DEVICE.uuid: share}, since=time.time() + 1000)
    assert len(agreed(tmp_path, "0").plan.slots) == 0
    other.change(devices={DEVICE.uuid: share._replace(most=0)})
    assert len(agreed(tmp_path, "0").plan.slots) == 2
