"""What is done for a test that waits: room is made, others are waited for, but not for ever."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_gpushare.plan.accounts import Ledger
from pytest_gpushare.plan.units import Unit
from pytest_gpushare.plan.work import Action, EmptyCaches, Shutdown, Tell
from pytest_gpushare.units import MB, format_gb

if TYPE_CHECKING:
    from pytest_gpushare.plan.gpu_side import GpuSide
    from pytest_gpushare.plan.gpu_worker import GpuWorker

WORTH_EMPTYING = 64 * MB
"""Bytes below which emptying caches is not worth the time."""
EMPTYING_TIMEOUT = 10.0
"""Seconds after which a worker that does not answer counts as having emptied its caches."""
AGAIN = 0.25
"""Seconds after which devices are looked at on which nothing has changed."""
PATIENCE = 0.5
"""Seconds for which VRAM may be missing before anything is said of it."""


@dataclass
class Blocked:
    """A device on which nothing starts, as others hold its VRAM."""

    since: float
    told: bool = False
    told_late: bool = False
    given_up: bool = False


@dataclass(frozen=True)
class Released:
    """VRAM that tests gave back last."""

    size: int
    at: float


class Waiting:
    """Looks at what does not fit, and why."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side
        self._blocked: dict[str, Blocked] = {}
        self._released: dict[str, Released] = {}
        self._stirred = float("-inf")

    def released(self, device: str, size: int) -> None:
        """A test or a process gave back so many bytes."""
        if size > 0:
            self._released[device] = Released(size, self._side.at)

    def started(self, device: str) -> Iterator[Tell]:
        """A test started on the device: nobody is in the way."""
        blocked = self._blocked.pop(device, None)
        if blocked is not None and blocked.told:
            label = self._side.ledgers[device].room.label
            waited = self._side.at - blocked.since
            text = f"{label}: there is VRAM for tests again, after {waited:.0f} s"
            yield Tell("pressure-over", text, {"device": device, "waited_s": round(waited, 3)})

    def stir(self) -> None:
        """Now and then look at every device: time may have changed what no event tells."""
        side = self._side
        if side.at - self._stirred < AGAIN:
            return
        self._stirred = side.at
        for it in side.workers.values():
            if it.emptying is not None and side.at - it.emptying > EMPTYING_TIMEOUT:
                it.emptying = None
                side.refresh(it)
        side.stirred.update(device for device, free in side.free.items() if free)

    def look(self, stirred: Collection[str]) -> Iterator[Action]:
        """What is to be done for the tests that wait on these devices."""
        side = self._side
        for device in stirred:
            if side.at != self._stirred and side.ledgers[device].is_running:
                # While a test runs there, to wait for it is the rule: now and then will do.
                continue
            found = self._target(device) if side.free[device] else None
            if found is None:
                continue
            it, unit = found
            if unit.since is None:
                unit.since = side.at
            yield from self._unblock(it, unit)

    def gave_up(self, it: GpuWorker, unit: Unit) -> tuple[str, int] | None:
        """Device and bytes left there, where the test has waited long enough for others' VRAM."""
        side = self._side
        need = side.bytes_for(it, unit.tests[0])
        for device in side.devices(it, side.kind(unit)[0]):
            blocked = self._blocked.get(device)
            live = side.ledgers[device].live(it.worker.id)
            if blocked is not None and blocked.given_up and live is not None and need > live:
                return device, max(0, live)
        return None

    @property
    def has_given_up(self) -> bool:
        """Whether tests wait no longer on some device."""
        return any(blocked.given_up for blocked in self._blocked.values())

    def _target(self, device: str) -> tuple[GpuWorker, Unit] | None:
        """The test for which something is done on this device, and the worker that would run it."""
        side = self._side
        free = list(side.free[device].values())
        claim = side.claims.head(device)
        bound = next((it for it in free if it.unit is not None and it.unit.tests), None)
        if claim is not None and claim.worker is not None and claim.worker in free:
            begun = claim.worker.unit
            return claim.worker, begun if begun is not None and begun.tests else claim.unit
        accounts = side.ledgers[device].accounts
        unbound = [it for it in free if it.unit is None or not it.unit.tests]
        unbound.sort(key=lambda it: -accounts[it.worker.id].committed)
        if claim is not None and claim.worker is None:
            able = next((it for it in unbound if side.could(it, claim.unit)), None)
            if able is not None:
                return able, claim.unit
        if bound is not None and bound.unit is not None:
            return bound, bound.unit
        for it in unbound:
            unit = self._front(it)
            if unit is not None:
                return it, unit
        return None

    def _front(self, it: GpuWorker) -> Unit | None:
        """The first pending unit that this worker may ever run."""
        side = self._side
        found = [unit for unit in side.pending.again if side.could(it, unit)]
        if found:
            return found[0]
        for kind, tree in side.pending.trees.items():
            devices = side.devices(it, kind[0])
            if len(devices) == kind[0]:
                most = min(side.ledgers[device].room.budget for device in devices)
                rank = tree.first(most)
                while rank >= 0 and not side.could(it, side.pending.units[rank]):
                    rank = tree.first(most, rank + 1)
                if rank >= 0:
                    found.append(side.pending.units[rank])
        found.sort(key=lambda unit: unit.rank)
        found += [unit for unit in side.pending.last if side.could(it, unit)]
        return found[0] if found else None

    def _unblock(self, it: GpuWorker, unit: Unit) -> Iterator[Action]:
        side = self._side
        need = side.bytes_for(it, unit.tests[0])
        count, exclusive = side.kind(unit)
        for device in side.devices(it, count):
            ledger = side.ledgers[device]
            others = [name for name in ledger.running if name != it.worker.id]
            short = need - ledger.left(it.worker.id)
            live = ledger.live(it.worker.id)
            if short <= 0 and live is not None and need > live:
                idle = list(self._empty(ledger, it, need - live, bool(others)))
                yield from idle
                if not idle and not self._is_emptying(ledger) and not self._will_do(ledger, need):
                    yield from self._missing(ledger, unit, need, live)
                return
            if short > 0:
                yield from self._make_room(ledger, it, unit, need)
                return
            if exclusive and others:
                return

    def _will_do(self, ledger: Ledger, need: int) -> bool:
        """Whether the test fits once our running tests are over, whatever others hold."""
        if not ledger.running or ledger.reading.free is None:
            return bool(ledger.running)
        held = sum(a.committed - a.outstanding for a in ledger.accounts.values())
        return ledger.reading.free - ledger.kept + held >= need

    def _is_emptying(self, ledger: Ledger) -> bool:
        workers = self._side.workers
        return any(
            name in workers and (workers[name].emptying is not None or workers[name].ending)
            for name in ledger.accounts
        )

    def _empty(self, ledger: Ledger, it: GpuWorker, short: int, busy: bool) -> Iterator[Action]:
        """Have idle neighbours give back what they retain, where that helps."""
        if self._side.policy.empty_caches == "never":
            return
        yield from self._ask(ledger, it, short, busy, fixtures=False)

    def _ask(
        self, ledger: Ledger, it: GpuWorker, short: int, busy: bool, *, fixtures: bool
    ) -> Iterator[Action]:
        found = [
            (ledger.retained(name), other)
            for name in ledger.accounts
            if (other := self._side.workers.get(name)) is not None
            and other is not it
            and other.is_free
            and other.emptied <= fixtures
            and ledger.retained(name) >= WORTH_EMPTYING
        ]
        if busy and sum(size for size, _ in found) < short:
            return
        for size, other in sorted(found, key=lambda pair: -pair[0]):
            if short <= 0:
                break
            short -= size
            other.emptying, other.emptied = self._side.at, 1 + fixtures
            self._side.refresh(other)
            yield EmptyCaches(other.worker.id, fixtures)

    def _make_room(self, ledger: Ledger, it: GpuWorker, unit: Unit, need: int) -> Iterator[Action]:
        """Take from idle neighbours what they hold, the gentlest way first."""
        if self._is_emptying(ledger):
            return
        others = [name for name in ledger.running if name != it.worker.id]
        short = need - ledger.left(it.worker.id)
        asked = list(self._empty(ledger, it, short, bool(others)))
        yield from asked
        in_the_way = need - ledger.most(it.worker.id)
        if asked or (others and in_the_way <= 0):
            return
        if not others:
            asked = list(self._ask(ledger, it, short, False, fixtures=True))
            yield from asked
            if asked:
                return
        yield from self._end(ledger, it, unit, in_the_way if others else short)

    def _end(self, ledger: Ledger, it: GpuWorker, unit: Unit, short: int) -> Iterator[Action]:
        side = self._side
        idle = [
            (ledger.accounts[name].committed, other)
            for name in ledger.accounts
            if (other := side.workers.get(name)) is not None and other is not it and other.is_free
        ]
        for size, other in sorted(idle, key=lambda pair: -pair[0]):
            if short <= 0 or size <= 0:
                break
            short -= size
            other.ending = True
            side.refresh(other)
            name = side.jobs[unit.tests[0]].nodeid
            text = f"{other.worker.id} ended: its {format_gb(size)} were in the way of {name}"
            yield Shutdown(other.worker.id)
            yield Tell("worker-ended", text, {"worker": other.worker.id, "bytes": size})

    def _missing(self, ledger: Ledger, unit: Unit, need: int, live: int) -> Iterator[Action]:
        """VRAM that should be free is not: it comes back late, or others took it."""
        side, room = self._side, ledger.room
        blocked = self._blocked.setdefault(room.uuid, Blocked(side.at))
        waited = side.at - blocked.since
        released = self._released.get(room.uuid)
        limit = side.policy.return_timeout
        facts: dict[str, int | float | str] = {
            "device": room.uuid,
            "need": need,
            "left": max(0, live),
        }
        if released is not None and need - live <= released.size:
            late = side.at - released.at
            if late < limit:
                if waited >= 4 * PATIENCE and not blocked.told_late:
                    blocked.told_late = True
                    size = format_gb(released.size)
                    yield Tell(
                        "late", f"{room.label}: {size} that tests gave back is not free yet", facts
                    )
                return
            if blocked.told_late:
                blocked.told_late = False
                size = format_gb(need - live)
                text = f"{room.label}: {size} did not come back within {limit:.0f} s{_by(ledger)}"
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
