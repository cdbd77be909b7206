"""Leases by the test: what is published while a session is alone, beside others, and at a fault."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pytest_gpushare.dispatch.leases_by_test import SharedDevices
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.host import pid_space
from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.leases.ledger import Ledger
from pytest_gpushare.leases.lessee import Lessee
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.scheduler.dispatcher import Dispatcher
from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import DeviceCapacity, DeviceReading, Job, Run, Worker

GPU = "GPU-0"
CAPACITY = DeviceCapacity(GPU, "GPU 0", 20, free=20, context=1)
JOBS = [
    Job(f"test_{number}", True, Need(size, source="marker"))
    for number, size in enumerate((8, 6, 5))
]


class Sharing:
    """A session with two workers and three tests, in a ledger."""

    def __init__(self, directory: Path) -> None:
        record = LeaseRecord(os.getpid(), began=1.0)
        self.lessee = Lessee(Ledger(directory), record, {GPU: 24}, None)
        self.lessee.change(devices={GPU: DeviceLease(20)})
        self.problems: list[str] = []
        self.woken = 0
        self.shared = SharedDevices(
            self.lessee, [CAPACITY], Naming(), self.problems.append, self.wake
        )
        self.dispatcher = Dispatcher(JOBS, [CAPACITY])
        for name in ("gw0", "gw1"):
            self.dispatcher.worker_up(Worker(name, (GPU,), 10))

    def wake(self) -> None:
        self.woken += 1

    def step(self, free: int | None = 20) -> list[int]:
        """The tests that start in a step."""
        actions = self.shared.step(self.dispatcher, lambda: {GPU: DeviceReading(free)})
        return [t for a in actions if isinstance(a, Run) and a.admitted for t in a.tests]

    @property
    def lease(self) -> DeviceLease:
        return self.lessee.record.lease(GPU)


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[Sharing]:
    made = Sharing(tmp_path / "leases")
    yield made
    made.lessee.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lessee]:
    record = LeaseRecord(os.getppid(), began=2.0)
    made = Lessee(Ledger(tmp_path / "leases"), record, {GPU: 24}, None)
    yield made
    made.close()


def test_alone_it_leases_all_and_says_what_it_would_give_back(sharing: Sharing) -> None:
    assert sharing.step() == [0, 1]
    assert not sharing.shared.is_shared
    # Two contexts stay; the third test runs in a worker that has one already.
    assert sharing.lease == DeviceLease(20, spare=18, idle=1, most=6)
    sharing.shared.look()
    assert sharing.woken == 0


def test_gives_up_what_it_does_not_use_when_another_one_comes(
    sharing: Sharing, other: Lessee
) -> None:
    sharing.step()
    other.change(devices={GPU: DeviceLease(0, 4)}, ticket=1, renewed=other._clock())
    sharing.shared.look()
    sharing.shared.look()
    assert sharing.woken == 1
    sharing.step()
    assert sharing.lease == DeviceLease(14, spare=12, idle=1, most=6)


def test_leaves_alone_what_others_have_leased(sharing: Sharing, other: Lessee) -> None:
    """Also where that is free still; the test that waits has a ticket for what it lacks."""
    other.change(devices={GPU: DeviceLease(11)})
    assert sharing.step() == [0]
    assert sharing.lease == DeviceLease(8, want=6, spare=7, idle=1, most=6)
    assert sharing.lessee.record.ticket
    other.change(devices={})
    assert sharing.step() == [1]


class Late:
    """A driver that lists who holds VRAM, but not in time what is free."""

    def memory(self) -> Mapping[str, Memory]:
        return {}

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        return {GPU: (GpuProcess(os.getppid(), 5),)}


def test_what_others_hold_is_theirs_also_where_nobody_knows_what_is_free(
    tmp_path: Path, sharing: Sharing, other: Lessee
) -> None:
    """As while the machine is so busy that a reading comes too late."""
    other.change(devices={GPU: DeviceLease(11)}, space=pid_space() or "")
    sharing.lessee._readings = Late()
    assert sharing.step(None) == [0]
    assert sharing.step(None) == []
    assert sharing.lease.lease == 8


def test_keeps_to_its_lease_where_the_ledger_fails(sharing: Sharing, tmp_path: Path) -> None:
    sharing.lessee.change(devices={GPU: DeviceLease(9)})
    sharing.lessee.ledger.close()
    assert sharing.step() == [0]
    assert sharing.step() == []
    (problem,) = sharing.problems
    assert problem.startswith("the leases of other sessions are not known: ")
