"""Waiting for a lease: first come, first served, with limits, and without hoarding."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from simulator.child import wait_for

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.leases import lessee as lessees
from pytest_gpushare.leases.ledger import Ledger, LedgerError
from pytest_gpushare.leases.lessee import Lessee, Outcome, Revision, View, Wish
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.waiting_line import WaitingLine

TOTAL = 10


class Clock:
    """A clock that only sleeping moves; with `tick`, so does every look."""

    tick = 0.0

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[tuple[float, object]] = []

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def at(self, moment: float, action: object) -> None:
        self.events.append((1000.0 + moment, action))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()  # type: ignore[operator]


class Readings:
    """NVML with a device of which nothing is used."""

    def __init__(self) -> None:
        self.lists = 0

    def memory(self) -> Mapping[str, Memory]:
        return {"GPU-0": Memory(TOTAL, 0, TOTAL)}

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        self.lists += 1
        return {"GPU-0": ()}


class World:
    """Sessions with one clock and one ledger."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.clock, self.pids = directory, Clock(), 0
        self.lessees: list[Lessee] = []

    def lessee(self, readings: Readings | None = None) -> Lessee:
        self.pids += 1
        found = Lessee(
            Ledger(self.directory, clock=self.clock),
            LeaseRecord(self.pids),
            {"GPU-0": TOTAL},
            readings,
            clock=self.clock,
            sleep=self.clock.sleep,
        )
        self.lessees.append(found)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "leases")
    with ExitStack() as stack:
        stack.callback(lambda: [lessee.close() for lessee in made.lessees])
        yield made


def wanting(size: int, total: int = TOTAL) -> lessees.Decide:
    def decide(view: View) -> Wish:
        claims = view.claims["GPU-0"]
        room = total - claims.leased
        room -= claims.ahead(room, view.ticket)
        fits = size <= room
        return Wish(
            {"GPU-0": DeviceLease(size if fits else 0, 0 if fits else size)},
            is_explained=size <= total,
        )

    return decide


def claim(lessee: Lessee, size: int, wait: float | None = None) -> Outcome:
    return lessee.claim(wanting(size), wait, lambda *_: None)


def test_alone_and_beside_another(world: World) -> None:
    readings = Readings()
    world.clock.tick = 1e-6
    one, two = world.lessee(readings), world.lessee(readings)
    outcome = claim(one, 6)
    assert outcome.is_granted
    assert readings.lists == 0
    # What the device has at this moment: a session may have ended since the start.
    assert outcome.view.memory == {"GPU-0": Memory(TOTAL, 0, TOTAL)}
    assert claim(two, 4).is_granted
    assert readings.lists == 1
    assert claim(world.lessee(), 1, wait=0.0).is_granted is False


def test_waits_until_a_lease_is_given_back(world: World) -> None:
    one, two = world.lessee(), world.lessee()
    claim(one, 10)
    world.clock.at(50.0, lambda: one.shrink({"GPU-0": 4}))
    outcome = claim(two, 6)
    assert outcome.is_granted
    assert 50 <= outcome.waited < 50.5
    assert two.record.ticket == 0


def test_default_limit_starts_again_with_progress(world: World) -> None:
    one, two = world.lessee(), world.lessee()
    claim(one, 10)
    world.clock.at(200.0, lambda: one.change(done=1))
    world.clock.at(450.0, lambda: one.change(done=2))
    outcome = claim(two, 6)
    assert not outcome.is_granted
    assert 749 < outcome.waited < 752


def test_explicit_limit_is_hard(world: World) -> None:
    one, two = world.lessee(), world.lessee()
    claim(one, 10)
    world.clock.at(5.0, lambda: one.change(done=1))
    outcome = claim(two, 6, wait=7.0)
    assert not outcome.is_granted
    assert 7 <= outcome.waited < 7.5
    assert two.record.lease("GPU-0").want == 0


def test_foreign_vram_is_not_waited_for_by_default(world: World) -> None:
    outcome = world.lessee().claim(wanting(6, total=3), None, lambda *_: None)
    assert (outcome.is_granted, outcome.waited) == (False, 0.0)


def test_explicit_wait_covers_foreign_vram(world: World) -> None:
    """It is waited for without a ticket being in anybody's way for longer than that."""
    lessee, total = world.lessee(), [3]

    def decide(view: View) -> Wish:
        return wanting(6, total=total[-1])(view)

    outcome = lessee.claim(decide, 7.0, lambda *_: None)
    assert not outcome.is_granted
    assert 7 <= outcome.waited < 7.5
    assert lessee.record.ticket == 0
    world.clock.at(world.clock.now - 1000.0 + 4.0, lambda: total.append(10))
    outcome = lessee.claim(decide, 7.0, lambda *_: None)
    assert outcome.is_granted
    assert 4 <= outcome.waited < 4.5


def test_vram_that_comes_back_late(world: World) -> None:
    """A driver gives it back some time after its session has ended: a moment is waited for that."""
    for back, is_granted in ((1.0, True), (30.0, False)):
        one, two, free = world.lessee(), world.lessee(), [0]
        claim(one, 10)
        world.clock.at(world.clock.now - 1000.0 + 50.0, one.leave)
        world.clock.at(world.clock.now - 1000.0 + 50.0 + back, lambda free=free: free.append(10))

        def decide(view: View, free: list[int] = free) -> Wish:
            is_there = bool(view.claims["GPU-0"].holders)
            fits = bool(free[-1])
            return Wish({"GPU-0": DeviceLease(6 * fits, 6 * (not fits))}, is_explained=is_there)

        outcome = two.claim(decide, None, lambda *_: None)
        assert (outcome.is_granted, outcome.waited < 60) == (is_granted, True)
        two.leave()


def test_first_come_first_served(world: World) -> None:
    """A later one that would fit does not overtake one that could be satisfied."""
    holder, first, second = world.lessee(), world.lessee(), world.lessee()
    claim(holder, 8)
    results = []

    def second_tries() -> None:
        results.append(("second", claim(second, 2, wait=0.0).is_granted))

    def frees() -> None:
        holder.shrink({"GPU-0": 4})
        second_tries()

    world.clock.at(1.0, frees)
    outcome = claim(first, 6)
    results.append(("first", outcome.is_granted))
    assert results == [("second", False), ("first", True)]


def test_stopped_waiter_blocks_nobody_after_5_s(world: World) -> None:
    stopped, other = world.lessee(), world.lessee()
    share = {"GPU-0": DeviceLease(0, 9)}
    stopped.change(devices=share, ticket=1, renewed=world.clock.now)
    outcome = claim(other, 6)
    assert outcome.is_granted
    assert 5 <= outcome.waited < 6


def test_hopeless_ticket_blocks_nobody(world: World) -> None:
    fixed, hopeless, small = world.lessee(), world.lessee(), world.lessee()
    claim(fixed, 6)
    hopeless.change(devices={"GPU-0": DeviceLease(0, 9)}, ticket=1, renewed=world.clock.now)
    assert claim(small, 3, wait=0.0).is_granted


def test_interrupted_waiter_leaves(world: World) -> None:
    one, two = world.lessee(), world.lessee()
    claim(one, 10)

    def interrupt(view: View, waited: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        two.claim(wanting(6), None, interrupt)
    with one.ledger.gate():
        assert one.ledger.others() == []


def test_twenty_waiters_in_their_order(world: World) -> None:
    """Each polls less often the more are before it; no ticket expires meanwhile."""
    one = world.lessee()
    claim(one, 10)
    waiter = world.lessee()
    for number in range(20):
        world.lessee().change(
            devices={"GPU-0": DeviceLease(0, 10)}, ticket=number + 1, renewed=world.clock.now
        )
    pauses: list[float] = []
    before = world.clock.now

    def report(view: View, waited: float) -> None:
        pauses.append(waited)
        if waited > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiter.claim(wanting(6), None, report)
    assert world.clock.now - before < 4.5
    assert max(b - a for a, b in pairwise(pauses)) <= 1.0


def test_ledger_that_fails_is_an_error_and_no_hang(world: World) -> None:
    one = world.lessee()
    one.ledger.close()
    with pytest.raises(LedgerError):
        claim(one, 1)
    assert one.change(done=1) is False
    assert one.problem


def test_larger_reservation_of_the_two_readings(world: World) -> None:
    """What was given back between the readings is not counted as free and as held."""

    class Changing(Readings):
        def memory(self) -> Mapping[str, Memory]:
            free = 9 if self.lists else 3
            return {"GPU-0": Memory(TOTAL, TOTAL - free, free)}

    claim(world.lessee(), 2)
    view = world.lessee(Changing()).view()
    assert view.memory == {"GPU-0": Memory(TOTAL, 7, 3)}


def test_vram_and_who_holds_it_are_of_one_moment(world: World) -> None:
    """Also where no other session is left: one that was waited for is in no list any more."""
    view = world.lessee(Readings()).view()
    assert view.memory == {"GPU-0": Memory(TOTAL, 0, TOTAL)}
    assert view.processes == {"GPU-0": ()}


def test_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """One at the start, and one a minute."""
    clock = Clock()
    line = WaitingLine(clock=clock)
    for second in range(130):
        clock.now = 1000.0 + second
        line.show(f"waiting {second} s")
    line.clear()
    assert capsys.readouterr().err == "waiting 0 s\nwaiting 60 s\nwaiting 120 s\n"


def test_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as the terminal at most, as a longer one would scroll; the hint comes once."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "40")
    line = WaitingLine()
    for second in range(3):
        line.show(f"waiting {second} s: {'x' * 100}", "a hint")
    line.clear()
    text = stream.getvalue()
    assert text.count("a hint\n") == 1
    assert [len(part) for part in text.replace("a hint\n", "").split("\r")] == [
        0,
        39,
        39,
        39,
        39,
        0,
    ]


def test_first_test_waits_with_the_ticket_of_the_start(world: World) -> None:
    """Whoever started earlier comes first, also where the lease of the start does not do."""
    holder, one, two = world.lessee(), world.lessee(), world.lessee()
    claim(holder, 10)
    world.clock.at(1.0, lambda: holder.shrink({"GPU-0": 8}))
    assert claim(one, 2).is_granted
    two.change(devices={"GPU-0": DeviceLease(0, 5)}, ticket=7, renewed=world.clock.now)

    def revise(*tests: int) -> int:
        share = {"GPU-0": DeviceLease(2, 3)}
        one.revise(lambda _: Revision(share, frozenset(("GPU-0", test) for test in tests)))
        return one.record.ticket

    asked = 1_000_000_000
    world.clock.now = 1002.0
    assert revise(4) == asked
    assert revise(4, 5) == asked
    world.clock.now = 1003.0
    assert revise(5) == 1_003_000_000
    assert revise(6) == 1_003_000_000
    assert revise() == 0


def test_ticket_is_the_time_of_the_question(world: World) -> None:
    """Not that of passing the gate, which several that come at once do in any order."""
    holder, early, late = world.lessee(), world.lessee(), world.lessee()
    claim(holder, 10)
    waits = {"GPU-0": DeviceLease(0, 10)}
    # It has asked half a millisecond later, and passed the gate before.
    late.change(devices=waits, ticket=1_000_000_500, renewed=world.clock.now)
    world.clock.at(1.0, holder.leave)
    outcome = claim(early, 10)
    assert outcome.is_granted
    assert outcome.waited < 2


def test_two_that_ask_in_the_same_microsecond(world: World) -> None:
    holder, one, two = world.lessee(), world.lessee(), world.lessee()
    claim(holder, 10)
    one.change(devices={"GPU-0": DeviceLease(0, 9)}, ticket=1_000_000_000, renewed=1000.0)
    tickets = []
    world.clock.at(0.1, lambda: tickets.append(two.record.ticket))
    assert not claim(two, 9, wait=0.2).is_granted
    assert tickets == [1_000_000_001]


def test_models_that_other_sessions_use(world: World) -> None:
    one, two = world.lessee(), world.lessee()
    two.change(models=("qwen2.5:14b", "m"))
    one.change(models=("mine",))
    assert one.models_of_others() == {"qwen2.5:14b", "m:latest"}


def test_waiters_get_their_turn_in_order_of_arrival(tmp_path: Path) -> None:
    """Eight at once with the real clock: each holds the whole device for a moment."""
    Ledger(tmp_path / "leases")
    order: list[int] = []
    threads = []

    def take_part(number: int) -> None:
        mine = Lessee(Ledger(tmp_path / "leases"), LeaseRecord(number), {"GPU-0": TOTAL}, None)
        outcome = mine.claim(wanting(TOTAL), 30.0, lambda *_: None)
        assert outcome.is_granted
        order.append(number)
        time.sleep(0.05)
        mine.close()

    def has_asked(number: int) -> bool:
        found = Ledger(tmp_path / "leases", is_reader=True).look()
        return number in order or number in [s.record.pid for s in found if s.record]

    for number in range(1, 9):
        threads.append(threading.Thread(target=take_part, args=(number,)))
        threads[-1].start()
        wait_for(partial(has_asked, number))
    for thread in threads:
        thread.join(30)
    assert order == list(range(1, 9))
