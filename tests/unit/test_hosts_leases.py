"""The lease on another host: whatever arrives when, no more is used than is leased there."""

from __future__ import annotations

import json
import random
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.gpu.devices import Device, GpuFacts, HostFacts
from pytest_gpushare.hosts.answers import Leased, LeasedDevice, message
from pytest_gpushare.hosts.asking import StartOfHosts
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.hosts.host_lease import HostLease, LeaseHere
from pytest_gpushare.leases.ledger import Ledger, LedgerError
from pytest_gpushare.leases.lessee import Lessee, Revision, View
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.neighbours import NeighbourShare
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.scheduler.sharing import OwnShare
from pytest_gpushare.scheduler.types import Others
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.units import GB, MOST_VRAM
from pytest_gpushare.waiting_line import WaitingLine

from .damage import ODD, damaged

HERE = Path("/nowhere")
SETTINGS = load(Written({}, {"gpu_share_config": ""}, {}, "", HERE, HERE, HERE))
DEVICE = Device("GPU-1", "a card", "0", 24 * GB, 2 * GB, 22 * GB, ())
BUDGET = 9 * GB


def plan() -> Plan:
    share = NeighbourShare("Ollama", {"GPU-1": 12 * GB}, {"GPU-1": 0})
    gpus = GpuFacts((DEVICE,), (DEVICE,))
    return make_plan(SETTINGS, gpus, [share], HostFacts(8, None), Request())


def lessee(directory: Path, pid: int) -> Lessee:
    record = LeaseRecord(pid, "", "/", "", time.time())
    return Lessee(Ledger(directory), record, {"GPU-1": DEVICE.total}, None)


class Run:
    """A run with tests on another host; messages take their time in both directions."""

    def __init__(self, directory: Path) -> None:
        self.lessee = lessee(directory, 1)
        self.to_host: deque[str] = deque()
        self.to_run: deque[dict[str, Any]] = deque()
        found = plan()
        slots = sum(slot.vram for slot in found.slots)
        self.lessee.change(devices={"GPU-1": DeviceLease(slots)})
        self.here = LeaseHere(self.lessee, found, True, self.to_run.append)
        self.there = HostLease({"GPU-1": "box:GPU-1"}, found, self.to_host.append, print)
        self.tests: list[int] = []
        """What the running tests need."""
        self.pending: list[int] = []

    @property
    def committed(self) -> int:
        return sum(self.tests)

    @property
    def leased(self) -> int:
        return self.lessee.record.lease("GPU-1").lease

    def step(self) -> None:
        """What the executor does: start what may start, and say what is there."""
        found = self.there.limited({})
        limit = BUDGET
        if found:
            others = found["box:GPU-1"].others
            assert others.leased is not None
            limit = min(others.leased, BUDGET - others.claimed)
        while self.pending and self.committed + self.pending[0] <= limit:
            self.tests.append(self.pending.pop(0))
        want = self.pending[0] if self.pending else 0
        want = want if self.committed + want <= BUDGET else 0
        most = max(self.pending, default=0)
        waits_for = len(self.pending) if want else None
        share = OwnShare(self.committed, self.committed, 0, 0, 0, most, want, waits_for, 13 * GB,
                         12 * GB, 12 * GB)  # fmt: skip
        self.there.publish({"box:GPU-1": share})

    def deliver(self, chance: random.Random) -> None:
        """A message arrives, or the host looks at the others."""
        choice = chance.randrange(3)
        if choice == 0 and self.to_host:
            word, _, line = self.to_host.popleft().partition(" ")
            assert word == "share"
            self.here.share(line)
        elif choice == 1 and self.to_run:
            self.there.take(self.to_run.popleft())
            self.step()
        else:
            self.here.look()


def other(session: Lessee, size: int) -> None:
    """Another session of the host leases so much if it is there."""

    def decide(view: View) -> Revision:
        there = size <= BUDGET - view.claims["GPU-1"].leased
        has = session.record.lease("GPU-1").lease
        waits = frozenset() if there or not size else frozenset({("GPU-1", 1)})
        lease = size if there or not size else has
        return Revision({"GPU-1": DeviceLease(lease, want=0 if there else size, most=size)}, waits)

    session.revise(decide)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_is_used_than_leased(tmp_path: Path, seed: int) -> None:
    """Whatever arrives when; and what others give back arrives in the end."""
    chance = random.Random(seed)
    run, session = Run(tmp_path / "leases"), lessee(tmp_path / "leases", 2)
    try:
        run.pending = [chance.randrange(1, 9) * GB for _ in range(20)]
        run.step()
        for _ in range(300):
            action = chance.randrange(8)
            if action == 0:
                other(session, chance.randrange(0, 9) * GB)
            elif action == 1 and run.tests:
                run.tests.pop(chance.randrange(len(run.tests)))
                run.step()
            else:
                run.deliver(chance)
            assert run.committed <= run.leased
            assert run.leased + session.record.lease("GPU-1").lease <= BUDGET
        session.leave()
        for _ in range(2000):
            if run.tests and not chance.randrange(4):
                run.tests.pop()
                run.step()
            run.deliver(chance)
            if not run.pending and not run.tests:
                break
        assert not run.pending
    finally:
        run.lessee.close()
        session.close()


def test_a_ledger_there_that_cannot_be_used_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests keep to what is leased, and another failure of the same kind says no more."""

    def fail(_decide: object) -> None:
        raise LedgerError("no space left on device")

    run, notes = Run(tmp_path / "leases"), list[str]()
    run.there = HostLease({"GPU-1": "box:GPU-1"}, plan(), run.to_host.append, notes.append)
    monkeypatch.setattr(run.lessee, "revise", fail)
    try:
        for need in (2 * GB, 3 * GB):
            run.pending = [need]
            run.step()
            run.here.share(run.to_host.popleft().removeprefix("share "))
            run.there.take(json.loads(json.dumps(run.to_run.popleft())))
            run.step()
            assert run.committed <= run.leased
            run.tests.clear()
    finally:
        run.lessee.close()
    assert notes == ["the leases of other sessions are not known: no space left on device"]


def test_an_answer_that_makes_no_sense_grants_nothing_and_is_not_waited_for() -> None:
    """It is refused as a whole or in part; the tests may ask again."""
    said: list[str] = []
    others = Others(GB, GB, 0, 0, 0, True, progress=1, names="pid 7: 1.0 GB")
    leased = Leased(1, True, "", {"GPU-1": LeasedDevice(8 * GB, others)})
    answer = json.loads(json.dumps(message("leased", leased)))
    refused = 0
    for found, place in damaged(answer, 300, ODD):
        lease = HostLease({"GPU-1": "box:GPU-1"}, plan(), said.append, said.append)
        lease.publish({"box:GPU-1": OwnShare(*[0] * 11)})
        try:
            lease.take(found)
        except ValueError:
            refused += 1
        limits = lease.limited({})
        if place not in (("kind",), ("value", 0)) and limits:
            limit = limits["box:GPU-1"].others
            assert not limit.is_asked
            assert limit.leased is not None
            assert 0 <= limit.leased <= MOST_VRAM
    assert refused > 100


def test_that_the_start_does_not_wait_is_no_setting_of_the_run() -> None:
    """A test that acquires VRAM waits for it as the user has set it.

    Nor is the start of this host refused where another one may have room.
    """
    found: list[tuple[object, bool]] = []

    def start(settings: Settings, _line: WaitingLine) -> StartFacts:
        found.append((settings.wait, settings.fallback_to_cpu_when_constrained))
        return StartFacts(settings, GpuFacts(), {}, plan())

    refusing = SETTINGS._replace(fallback_to_cpu_when_constrained=False)
    hosts = StartOfHosts(refusing, [], start, Checkout(), strict=False)
    hosts.ask()
    assert found == [(0, True)]
    assert hosts.here is not None
    assert hosts.here.settings == refusing


def test_what_others_give_back_on_another_host_is_for_tests_too() -> None:
    """The lease by the test on this host leaves the other host's figures as they are."""
    there = replace(DEVICE, uuid="box:GPU-1", host="box")
    here, box = (replace(plan().devices[0], device=device) for device in (DEVICE, there))
    both = replace(plan(), devices=(here, replace(box, alone=12 * GB)))
    facts = StartFacts(SETTINGS, GpuFacts(), {}, both, alone={"GPU-1": 10 * GB})
    run = ActiveRun(facts)
    run.allow_vram_of_others()
    assert [planned.alone for planned in run.plan.devices] == [10 * GB, 12 * GB]
