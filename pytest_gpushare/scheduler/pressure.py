"""What is done for a test that waits: room is made, others are waited for, but not for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_gpushare.scheduler.accounts import Ledger
from pytest_gpushare.scheduler.admission import next_on
from pytest_gpushare.scheduler.gpu_pool import GpuSide, GpuWorker
from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.types import Action, EmptyCaches, Run, Shutdown, Tell
from pytest_gpushare.units import MB, format_gb

WORTH_EMPTYING = 64 * MB
"""Bytes below which emptying caches is not worth the time."""


class MakingRoom:
    """Takes from idle workers what they hold, the gentlest way first."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side

    def is_under_way(self, ledger: Ledger) -> bool:
        """Whether a worker gives something back at this moment."""
        workers = self._side.workers
        for name in ledger.accounts:
            it = workers.get(name)
            if it is not None and (it.emptying is not None or it.ending):
                return True
        return False

    def make(self, ledger: Ledger, it: GpuWorker, unit: Unit, need: int) -> list[Action]:
        """Have neighbours empty their caches, give up fixtures or end, as far as it helps."""
        if self.is_under_way(ledger):
            return []
        busy = ledger.runs_beside(it.id)
        short = need - ledger.left(it.id)
        asked = self.empty(ledger, it, short, busy)
        if asked:
            return asked
        in_the_way = need - ledger.most(it.id)
        if busy and in_the_way <= 0:
            return []
        if not busy:
            asked = self._ask(ledger, it, short, busy=False, fixtures=True)
            if asked:
                return asked
        return self._end(ledger, it, unit, in_the_way if busy else short)

    def empty(self, ledger: Ledger, it: GpuWorker, short: int, busy: bool) -> list[Action]:
        """Have idle neighbours give back what they retain, where that helps."""
        if self._side.policy.empty_caches == "never":
            return []
        return self._ask(ledger, it, short, busy=busy, fixtures=False)

    def _ask(
        self, ledger: Ledger, it: GpuWorker, short: int, *, busy: bool, fixtures: bool
    ) -> list[Action]:
        side = self._side
        found = [
            (size, other)
            for size, name in ledger.retained(WORTH_EMPTYING)
            if (other := side.workers.get(name)) is not None
            and other is not it
            and other.is_free
            and other.emptied <= fixtures
        ]
        if not found or (busy and sum(size for size, _ in found) < short):
            return []
        asked: list[Action] = []
        for size, other in sorted(found, key=lambda pair: -pair[0]):
            if short <= 0:
                break
            short -= size
            other.emptying, other.emptied = side.at, 1 + fixtures
            side.refresh(other)
            asked.append(EmptyCaches(other.id, fixtures))
        return asked

    def _end(self, ledger: Ledger, it: GpuWorker, unit: Unit, short: int) -> list[Action]:
        side = self._side
        idle = [
            (ledger.accounts[name].committed, other)
            for name in ledger.accounts
            if (other := side.workers.get(name)) is not None and other is not it and other.is_free
        ]
        actions: list[Action] = []
        for size, other in sorted(idle, key=lambda pair: -pair[0]):
            if short <= 0 or size <= 0:
                break
            short -= size
            other.ending = True
            side.refresh(other)
            name = side.jobs[unit.tests[0]].nodeid
            text = f"{other.id} ended: its {format_gb(size)} were in the way of {name}"
            actions.append(Shutdown(other.id))
            actions.append(Tell("worker-ended", text, {"worker": other.id, "bytes": size}))
        return actions


EMPTYING_TIMEOUT = 10.0
"""Seconds after which a worker that does not answer counts as having emptied its caches."""
AGAIN = 0.25
"""Seconds after which devices are looked at on which nothing has changed."""
AGAIN_WHILE_BUSY = 2.0
"""The same where a test runs: when that is over, something has changed."""
PATIENCE = 0.5
"""Seconds for which VRAM may be missing before anything is said of it."""


@dataclass
class Blocked:
    """A device on which nothing starts, as others hold its VRAM."""

    since: float
    told: bool = False
    told_late: bool = False
    given_up: bool = False


class Waiting:
    """Looks at what does not fit, and why."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side
        self._room = MakingRoom(side)
        self._blocked: dict[str, Blocked] = {}
        self._released: dict[str, tuple[int, float]] = {}
        """Device -> the VRAM that tests gave back last, in bytes, and when."""
        self.due_at = float("-inf")
        """When every device is to be looked at: no event tells what time has changed."""

    def released(self, device: str, size: int) -> None:
        """A test or a process gave back so many bytes."""
        if size > 0:
            self._released[device] = size, self._side.at

    def begun(self, runs: Sequence[Run]) -> Iterator[Action]:
        """These tests, and the word that nobody is in their way any more."""
        side = self._side
        for run in runs:
            yield run
            it = side.workers[run.worker]
            for device in side.devices(it, side.need(run.tests[0]).devices):
                yield from self._started(device)

    def _started(self, device: str) -> Iterator[Tell]:
        """A test started on the device: nobody is in the way."""
        blocked = self._blocked.pop(device, None)
        if blocked is not None and blocked.told:
            label = self._side.ledgers[device].room.label
            waited = self._side.at - blocked.since
            text = f"{label}: there is VRAM for tests again, after {waited:.0f} s"
            yield Tell("pressure-over", text, {"device": device, "waited_s": round(waited, 3)})

    def stir(self) -> None:
        """What time may have changed."""
        side = self._side
        self.due_at = side.at + AGAIN
        for it in side.workers.values():
            if it.emptying is not None and side.at - it.emptying > EMPTYING_TIMEOUT:
                it.emptying = None
                side.refresh(it)
        side.stirred.update(
            device
            for device, free in side.free.items()
            if free
            and side.at - side.filled[device]
            >= (AGAIN_WHILE_BUSY if side.ledgers[device].running else AGAIN)
        )

    def look(self, devices: Sequence[str], *, at_all: bool) -> list[Action]:
        """What is to be done for the tests that wait on these devices, or on all of them."""
        side = self._side
        actions: list[Action] = []
        for device in sorted(side.free) if at_all else devices:
            if not side.free[device] or (side.ledgers[device].running and not at_all):
                # While a test runs there, to wait for it is the rule: now and then will do.
                continue
            found = next_on(device, side)
            if found is None:
                continue
            it, unit = found
            if unit.since is None:
                unit.since = side.at
            actions += self._unblock(it, unit)
        return actions

    def gave_up(self, it: GpuWorker, unit: Unit) -> tuple[str, int] | None:
        """Device and bytes left there, where the test has waited long enough for others' VRAM."""
        side = self._side
        need = side.bytes_for(it, unit.tests[0])
        for device in side.devices(it, side.kind(unit)[0]):
            blocked = self._blocked.get(device)
            live = side.ledgers[device].live(it.id)
            if blocked is not None and blocked.given_up and live is not None and need > live:
                return device, max(0, live)
        return None

    @property
    def is_blocked(self) -> bool:
        """Whether others are in the way on some device."""
        return bool(self._blocked)

    @property
    def has_given_up(self) -> bool:
        """Whether tests wait no longer on some device."""
        blocked = self._blocked
        return bool(blocked) and any(one.given_up for one in blocked.values())

    def _unblock(self, it: GpuWorker, unit: Unit) -> list[Action]:
        side, room = self._side, self._room
        need = side.bytes_for(it, unit.tests[0])
        count, exclusive = side.kind(unit)
        for device in side.devices(it, count):
            ledger = side.ledgers[device]
            if need > ledger.left(it.id):
                return room.make(ledger, it, unit, need)
            live = ledger.live(it.id)
            if live is not None and need > live:
                asked = room.empty(ledger, it, need - live, ledger.runs_beside(it.id))
                if asked or room.is_under_way(ledger) or self._will_do(ledger, need):
                    return asked
                return list(self._missing(ledger, unit, need, live))
            if exclusive and ledger.runs_beside(it.id):
                return []
        return []

    def _will_do(self, ledger: Ledger, need: int) -> bool:
        """Whether the test fits once our running tests are over, whatever others hold."""
        if not ledger.running or ledger.reading.free is None:
            return bool(ledger.running)
        held = ledger.committed - ledger.outstanding
        return ledger.reading.free - ledger.kept + held >= need

    def _missing(self, ledger: Ledger, unit: Unit, need: int, live: int) -> Iterator[Action]:
        """VRAM that should be free is not: it comes back late, or others took it."""
        side, room = self._side, ledger.room
        blocked = self._blocked.setdefault(room.uuid, Blocked(side.at))
        waited = side.at - blocked.since
        size, released = self._released.get(room.uuid, (0, 0.0))
        limit = side.policy.return_timeout
        facts: dict[str, int | float | str] = {
            "device": room.uuid,
            "need": need,
            "left": max(0, live),
        }
        if need - live <= size:
            late = side.at - released
            if late < limit:
                if waited >= 4 * PATIENCE and not blocked.told_late:
                    blocked.told_late = True
                    text = f"{room.label}: {format_gb(size)} that tests gave back is not free yet"
                    yield Tell("late", text, facts)
                return
            if blocked.told_late:
                blocked.told_late = False
                back = format_gb(need - live)
                text = f"{room.label}: {back} did not come back within {limit:.0f} s{_by(ledger)}"
                yield Tell("late", text, facts)
        if waited >= PATIENCE and not blocked.told:
            blocked.told = True
            name = side.jobs[unit.tests[0]].nodeid
            text = (
                f"{room.label}: {name} needs {format_gb(need)} and waits: "
                f"{format_gb(max(0, live))} is left for tests{_by(ledger)}"
            )
            yield Tell("pressure", text, facts)
        if waited >= side.policy.pressure_timeout:
            blocked.given_up = True


def _by(ledger: Ledger) -> str:
    return f"; held by {ledger.reading.holders}" if ledger.reading.holders else ""
