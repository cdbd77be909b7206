"""This session's record while it runs, and the sessions that `watch` shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulator.child import wait_for

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.leases.claims import DeviceClaims, Holder, Naming
from pytest_gpushare.leases.ledger import Ledger, LiveSession
from pytest_gpushare.leases.lessee import Lessee, View
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.planning.plan import Limit, Plan, Request, Slot
from pytest_gpushare.session import session_record
from pytest_gpushare.session.session_record import OtherLease, OtherLeases, SessionRecord, sessions
from pytest_gpushare.session.tests import RecordedTests
from pytest_gpushare.session.workers import Workers
from pytest_gpushare.wire import Links

GPU = Device("GPU-0", "RTX", "0", 24, 2, 22)
PLAN = Plan((Slot(GPU, 5), Slot(GPU, 5)), 1, (Limit.BY_CAP,), (), (), Request())


class Running:
    """A session with two GPU workers and a CPU worker."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers = Workers(PLAN, lambda _: 0)
        self.tests = RecordedTests(self.workers)
        self.links = Links()
        record = LeaseRecord(os.getpid(), root="/project", began=5.0)
        self.lessee = Lessee(Ledger(directory), record, {"GPU-0": 24}, None)
        self.lessee.change(devices={"GPU-0": DeviceLease(10)})
        self.others = OtherLeases(Naming(shows_everybody=False), lambda: 1.0)
        self.service = SessionRecord(
            self.lessee,
            PLAN,
            lambda: list(self.workers),
            self.tests,
            self.links,
            self.others,
        )
        for number in range(3):
            self.workers.join(f"gw{number}", number, 0.0)
            self.workers.came_up(f"gw{number}", 100 + number)
        self.service.start()
        wait_for(lambda: len(self.shown().workers) == 3)

    def shown(self) -> session_record.RunningSession:
        (found,) = sessions(self.directory)
        return found


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(session_record, "INTERVAL", 0.01)
    made = Running(tmp_path / "leases")
    yield made
    made.service.stop()
    made.lessee.close()


def test_from_start_to_stop(running: Running) -> None:
    shown = running.shown()
    assert (shown.pid, shown.root, shown.owner) == (os.getpid(), "/project", "")
    assert [worker.id for worker in shown.workers] == ["gw0", "gw1", "gw2"]
    assert (shown.workers[0].device, shown.workers[0].slot) == ("GPU-0", 5)
    assert shown.leases == {"GPU-0": 10}
    assert shown.workers[0].is_bounded
    running.service.admits_by_needs()
    running.tests.total = 7
    running.tests.counts["passed"] = 3
    wait_for(lambda: not running.shown().workers[0].is_bounded)
    assert (running.shown().done, running.shown().total) == (3, 7)
    running.service.stop()
    assert sessions(running.directory) == []


def test_slots_are_given_back_as_workers_end(running: Running) -> None:
    """That of a crashed worker is kept for the one that replaces it."""
    running.workers.leave("gw0", 1.0, crashed=True)
    running.workers.leave("gw2", 1.0, crashed=False)
    wait_for(lambda: len(running.shown().workers) == 1)
    assert running.shown().leases == {"GPU-0": 10}
    running.workers.leave("gw1", 2.0, crashed=False)
    wait_for(lambda: running.shown().leases == {"GPU-0": 5})


def test_last_slots_are_given_back_with_the_record(running: Running) -> None:
    """Until then the processes of the last workers are there, and hold what they hold."""
    for worker in ("gw0", "gw1", "gw2"):
        running.workers.leave(worker, 1.0, crashed=False)
    wait_for(lambda: not running.shown().workers)
    assert running.shown().leases == {"GPU-0": 10}


def test_removed_record_comes_back_and_workers_are_told(running: Running) -> None:
    sent: list[object] = []
    running.links.attach("gw0", sent.append)
    (path,) = running.directory.glob("s-*")
    path.unlink()
    wait_for(lambda: bool(sent))
    (again,) = running.directory.glob("s-*")
    assert sent == [("lease", str(again))]
    assert running.shown().leases == {"GPU-0": 10}


def test_no_directory(tmp_path: Path) -> None:
    assert sessions(tmp_path / "nowhere") == []


def test_record_of_another_process(tmp_path: Path) -> None:
    """Damaged ones are not shown."""
    ledger = Ledger(tmp_path / "leases")
    record = LeaseRecord(7, began=Record().began_at)
    with ledger.gate():
        ledger.publish(record)
    (path,) = (tmp_path / "leases").glob("s-*")
    assert sessions(tmp_path / "leases")[0].pid == 7
    path.write_bytes(b"\0" * 4096)
    assert sessions(tmp_path / "leases") == []


def test_leases_of_others_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry for as long as the lease is the same; sessions of others have no name."""
    now = [0.0]
    found = OtherLeases(Naming(shows_everybody=False), lambda: now[0])
    mine = LiveSession("s-1", None, LeaseRecord(7, root="/srv/a", user="ci"))
    other = LiveSession("s-2", 4_000_000, LeaseRecord(8, root="/srv/b", user="ci"))

    def see(at: float, *holders: Holder) -> None:
        now[0] = at
        found.see(View(claims={"GPU-0": DeviceClaims(holders)}))

    see(1.0, Holder(mine, 9, None))
    see(2.0, Holder(mine, 9, None), Holder(other, 3, None))
    see(3.0, Holder(mine, 4, None), Holder(other, 3, None))
    see(4.0)
    see(5.0, Holder(mine, 4, None))
    own = "pid 7, ci, in /srv/a"
    assert list(found) == [
        OtherLease("GPU-0", own, 1.0, 3.0, 9),
        OtherLease("GPU-0", "another user", 2.0, 3.0, 3),
        OtherLease("GPU-0", own, 3.0, 3.0, 4),
        OtherLease("GPU-0", own, 5.0, 5.0, 4),
    ]
    monkeypatch.setattr(session_record, "MOST_LEASES", 4)
    see(6.0, Holder(mine, 8, None))
    assert list(found)[-1] == OtherLease("GPU-0", own, 5.0, 6.0, 8)
