"""What other sessions claim: counted once, never more than there is, first come, first served."""

from __future__ import annotations

import pytest

from pytest_gpushare.gpu.devices import GpuProcess
from pytest_gpushare.leases.claims import (
    NEWCOMER,
    DeviceClaims,
    Naming,
    Share,
    Waiting,
    claims_of,
)
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


def test_what_ended_workers_still_hold_is_their_sessions() -> None:
    """It has leased nothing any more; who waits for the VRAM learns that it will come back."""
    found = claims(session(devices={"GPU-0": DeviceLease()}), processes=(GpuProcess(1300, GB),))
    assert (found.leased, found.held, found.shares) == (0, GB, ())
    assert "1.0 GB" in Naming().holder(found.holders[0], 0.0)


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


@pytest.mark.parametrize("first", [True, False])
def test_what_a_test_leases_by_itself(first: bool) -> None:
    """It is part of what its run has leased, whichever record is read first: 9 and 2 GB."""
    own = session("own", pid=1300, workers=(), devices={"GPU-0": DeviceLease(2 * GB)})
    both = (own, session()) if first else (session(), own)
    found = claims(*both, processes=(GpuProcess(1300, 10 * GB),))
    assert [(h.session.name, h.lease, h.held) for h in found.holders] == [("a", 11 * GB, 10 * GB)]
    assert found.leased == GB
    assert claims(*both, processes=None).leased == 11 * GB


def test_claim_beyond_the_device_is_cut() -> None:
    assert claims(session(devices={"GPU-0": DeviceLease(100 * GB)})).leased == 24 * GB


def test_largest_reservation_counts_once() -> None:
    found = claims(
        session(devices={"GPU-0": DeviceLease(GB, reserved=12 * GB)}),
        session("b", devices={"GPU-0": DeviceLease(GB, reserved=10 * GB)}),
    )
    assert (found.reserved, found.leased) == (12 * GB, 2 * GB)


def test_reservation_of_one_that_waits_for_its_start() -> None:
    """It runs no test yet: older sessions would wait for it, and it for them."""
    share = {"GPU-0": DeviceLease(0, want=3 * GB, reserved=12 * GB)}
    waits = session(devices=share, ticket=1, renewed=100.0)
    assert claims(waits).reserved == 0
    on_cpu_workers = session(devices=share)
    by_the_test = session(devices=share, ticket=1, renewed=100.0, since=5.0)
    assert [claims(each).reserved for each in (on_cpu_workers, by_the_test)] == [12 * GB] * 2


def test_ticket_counts_with_what_it_keeps_for_ollama() -> None:
    """9 GB beside 12 GB do not fit into 20: nobody waits for a session that cannot start."""
    share = {"GPU-0": DeviceLease(0, want=9 * GB, reserved=12 * GB)}
    found = claims(session(devices=share, ticket=1, renewed=100.0))
    assert found.ahead(20 * GB) == 0
    assert found.ahead(21 * GB) == 21 * GB
    # The reader keeps as much itself: it is not in the room.
    assert found.ahead(9 * GB, reserved=12 * GB) == 9 * GB


def test_record_that_is_not_understood_claims_nothing() -> None:
    assert claims(LiveSession("a", 0, problem="it is damaged")).leased == 0


def waiting(ticket: int, want: int, renewed: float) -> LiveSession:
    share = {"GPU-0": DeviceLease(0, want)}
    return session(str(ticket), devices=share, ticket=ticket, renewed=renewed)


def test_tickets_in_their_order_while_they_are_renewed() -> None:
    found = claims(waiting(7, GB, 99.0), waiting(5, 2 * GB, 96.0), waiting(4, GB, 94.0))
    start, _ = NEWCOMER.seniority
    assert found.waiting == (
        Waiting(5, 2 * GB, (start, "5"), True),
        Waiting(7, GB, (start, "7"), True),
    )


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
    assert hopeless._replace(shares=(Share((0.0, "a"), spare=12),)).ahead(8) == 20
    # A session's own tests end, too.
    assert hopeless.ahead(8, own=Share((9.0, "own"), spare=12)) == 20


def test_sessions_start_in_the_order_in_which_they_asked() -> None:
    """A later one takes no part of a room that does for both: the first may want all of it."""
    first = Waiting(1, 4, (1.0, "a"), is_fixed=True)
    found = DeviceClaims(waiting=(first,))
    assert found.ahead(10, starts=20) == 10
    assert found.ahead(10, ticket=1, starts=20) == 0
    # A test that waits says how much it takes.
    assert DeviceClaims(waiting=(first._replace(is_fixed=False),)).ahead(10, starts=20) == 4
    assert found.ahead(3, starts=20) == 0
    # It has to wait for the largest test of an older session; a later one may do with less.
    older = Share((0.0, "b"), kept=1, most=17)
    assert found._replace(shares=(older,)).ahead(10, starts=20) == 4


OLDEST, OLD, OWN, YOUNG = ((float(number), "s") for number in range(4))


def test_ticket_counts_with_what_younger_sessions_give_up() -> None:
    """Idle workers are ended for an older session, not for a younger one."""
    idle = Share(YOUNG, kept=6, idle=5)
    assert DeviceClaims(waiting=(Waiting(1, 10, OLD),), shares=(idle,)).ahead(5) == 10
    late = DeviceClaims(waiting=(Waiting(1, 10, YOUNG),), shares=(Share(OLD, kept=6, idle=5),))
    assert late.ahead(5) == 0
    assert late.ahead(5, own=Share(OWN, kept=6, idle=5)) == 0


def test_newcomer_waits_for_the_largest_test_of_an_older_session() -> None:
    """Then the older ones leave nothing for it; those that came later do."""
    newcomer = Waiting(1, 5, OWN, is_fixed=True)
    claims = DeviceClaims(waiting=(newcomer,), shares=(Share(OLD, kept=1, most=16),))
    oldest = Share(OLDEST, kept=2, spare=4, most=20)
    assert claims.ahead(10, own=oldest, capacity=24) == 0
    assert claims.ahead(10, own=oldest._replace(most=18), capacity=24) == 5
    assert claims.ahead(10, own=oldest._replace(most=0), capacity=21) == 5
    assert claims.ahead(10, own=oldest._replace(most=0), capacity=20) == 0
    assert claims.ahead(10, own=Share(YOUNG), capacity=20) == 5
    assert (
        claims._replace(waiting=(newcomer._replace(is_fixed=False),)).ahead(
            10, own=oldest, capacity=24
        )
        == 5
    )


def test_newcomer_is_younger_than_who_leases_by_the_test() -> None:
    """Whenever the two were started: else each would wait for the other as the older one."""
    want = {"GPU-0": DeviceLease(0, 5 * GB)}
    newcomer = session("a", began=1.0, devices=want, ticket=1, renewed=100.0)
    found = claims(newcomer)
    own = Share((2.0, "own"), kept=2 * GB, spare=2 * GB, most=20 * GB)
    assert found.ahead(10 * GB, own=own, capacity=24 * GB) == 0
    # It has begun to lease by the test, and waits for more.
    begun = claims(session("a", began=1.0, since=1.5, devices=want, ticket=1, renewed=100.0))
    assert begun.ahead(10 * GB, own=own, capacity=24 * GB) == 5 * GB


def test_what_may_be_kept_beside_older_sessions() -> None:
    """So much that each older one can run its largest test beside what the younger ones keep."""
    older = (Share(OLDEST, kept=2, most=12), Share(OLD, kept=1, most=16))
    claims = DeviceClaims(shares=(*older, Share(YOUNG, kept=2, most=20)))
    # The oldest: 24 - 12 - (1 + 3 + 2); the second: 24 - 16 - (3 + 2).
    assert claims.keepable(24, Share(OWN, kept=3)) == 3
    assert claims.keepable(20, Share(OWN, kept=3)) == -1
    assert claims._replace(shares=older[:1]).keepable(24, Share(OWN, kept=3)) == 9
    assert DeviceClaims(shares=(Share(YOUNG, 5, most=20),)).keepable(24, Share(OWN)) is None


def test_fixed_lease_of_an_older_session_needs_no_more_than_it_is() -> None:
    assert DeviceClaims(shares=(Share(OLD, kept=14),)).keepable(24, Share(OWN)) is None


def test_what_is_owed_to_an_older_session() -> None:
    """What its ticket lacks when all tests are over; the youngest sessions pay first."""
    own = Share(OWN, kept=5, spare=2, idle=4)
    claims = DeviceClaims(waiting=(Waiting(1, 8, OLD),), shares=(Share(OLD, kept=1),))
    assert claims.owed(3, own) == 3
    assert claims.owed(6, own) == 0
    assert claims.owed(0, own) == 4
    younger = claims._replace(shares=(*claims.shares, Share(YOUNG, kept=3, idle=2)))
    assert younger.owed(3, own) == 1
    assert claims._replace(waiting=(Waiting(1, 8, YOUNG),)).owed(3, own) == 0


def test_shares_of_the_others() -> None:
    """The oldest first; of what does not lease and does not wait, nothing."""
    found = claims(
        session("b", began=2.0, devices={"GPU-0": DeviceLease(9, spare=5, idle=2, most=99 * GB)}),
        session("a", began=1.0, devices={"GPU-0": DeviceLease(4)}),
        session("c", began=0.0, devices={"GPU-0": DeviceLease(0)}),
    )
    assert found.shares == (
        Share((1.0, "a"), kept=4),
        Share((2.0, "b"), kept=4, spare=5, idle=2, most=24 * GB),
    )


def test_others_are_named_as_far_as_they_may_be() -> None:
    mine = session()
    other = LiveSession("b", 4_000_000, mine.record)
    assert Naming().session(mine) == "pid 1234, ?, in /srv/a"
    assert Naming().session(other) == "pid 1234, uid 4000000, in a"
    assert Naming(shows_everybody=False).session(other) == "another user"
