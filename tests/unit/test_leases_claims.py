"""What other sessions claim: counted once, never more than there is, first come, first served."""

from __future__ import annotations

import pytest

from pytest_gpushare.gpu.devices import GpuProcess
from pytest_gpushare.leases.claims import DeviceClaims, Naming, Waiting, claims_of
from pytest_gpushare.leases.ledger import LiveSession
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, SessionWorker

GB = 1 << 30
HERE = "boot/pid:[1]"
TREE = {1300: [1300, 1234, 1], 1301: [1301, 1300, 1234, 1], 9: [9, 1], 77: []}


def session(name: str = "a", **fields: object) -> LiveSession:
    record = LeaseRecord(
        1234,
        HERE,
        "/srv/a",
        devices={"GPU-0": DeviceLease(9 * GB)},
        workers=(SessionWorker("gw0", 1300, "gpu", "GPU-0", 9 * GB),),
    )
    return LiveSession(name, None, record._replace(**fields))  # type: ignore[arg-type]


def claims(
    *sessions: LiveSession, processes: tuple[GpuProcess, ...] | None = (), now: float = 100.0
) -> DeviceClaims:
    return claims_of(
        sessions,
        {"GPU-0": 24 * GB},
        {"GPU-0": processes},
        space=HERE,
        now=now,
        ancestors=lambda pid: TREE[pid],
    )["GPU-0"]


def test_what_is_taken_is_not_counted_twice() -> None:
    """Its workers' VRAM is in `used` already, and so is that of their descendants."""
    found = claims(
        session(), processes=(GpuProcess(1300, 2 * GB), GpuProcess(1301, GB), GpuProcess(9, 4 * GB))
    )
    assert found.leased == 6 * GB
    assert found.holders[0].held == 3 * GB


def test_more_than_leased_is_no_credit() -> None:
    assert claims(session(), processes=(GpuProcess(1300, 12 * GB),)).leased == 0


@pytest.mark.parametrize(
    "processes",
    [None, (GpuProcess(1300, None),), (GpuProcess(1300, GB), GpuProcess(77, GB))],
    ids=["no list", "no sizes", "PIDs of another namespace"],
)
def test_counts_whole_where_pids_cannot_be_compared(
    processes: tuple[GpuProcess, ...] | None,
) -> None:
    found = claims(session(), processes=processes)
    assert found.leased == 9 * GB
    assert found.holders[0].held is None


def test_pid_of_another_namespace_is_somebody_else() -> None:
    found = claims(session(space="boot/pid:[2]"), processes=(GpuProcess(1300, 5 * GB),))
    assert found.leased == 9 * GB


def test_claim_beyond_the_device_is_cut() -> None:
    assert claims(session(devices={"GPU-0": DeviceLease(100 * GB)})).leased == 24 * GB


def test_largest_reservation_counts_once() -> None:
    found = claims(
        session(devices={"GPU-0": DeviceLease(GB, reserved=12 * GB)}),
        session("b", devices={"GPU-0": DeviceLease(GB, reserved=10 * GB)}),
    )
    assert (found.reserved, found.leased) == (12 * GB, 2 * GB)


def test_record_that_is_not_understood_claims_nothing() -> None:
    assert claims(LiveSession("a", 0, None, "it is damaged")).leased == 0


def waiting(ticket: int, want: int, renewed: float) -> LiveSession:
    share = {"GPU-0": DeviceLease(0, want)}
    return session(str(ticket), devices=share, ticket=ticket, renewed=renewed)


def test_tickets_in_their_order_while_they_are_renewed() -> None:
    found = claims(waiting(7, GB, 99.0), waiting(5, 2 * GB, 96.0), waiting(4, GB, 94.0))
    assert found.waiting == (Waiting(5, 2 * GB), Waiting(7, GB))


def test_room_is_kept_for_those_who_asked_before() -> None:
    found = DeviceClaims(waiting=(Waiting(1, 4), Waiting(2, 5), Waiting(3, 2)))
    assert found.ahead(10) == 4 + 5
    assert found.ahead(11) == 4 + 5 + 2
    assert found.ahead(10, ticket=2) == 4
    assert found.ahead(10, ticket=1) == 0


def test_hopeless_ticket_blocks_nobody() -> None:
    """20 GB behind a fixed lease; with what an elastic session gives back it would count."""
    hopeless = DeviceClaims(waiting=(Waiting(1, 20), Waiting(2, 3)))
    assert hopeless.ahead(8) == 3
    assert hopeless._replace(spare=12).ahead(8) == 20


def test_others_are_named_as_far_as_they_may_be() -> None:
    mine = session()
    other = LiveSession("b", 4_000_000, mine.record)
    assert Naming().session(mine) == "pid 1234, ?, in /srv/a"
    assert Naming().session(other) == "pid 1234, uid 4000000, in a"
    assert Naming(shows_everybody=False).session(other) == "another user"
