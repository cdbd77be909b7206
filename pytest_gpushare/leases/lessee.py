"""One session's side of the ledger: it claims VRAM, waits for it, and gives it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.host import line_of, pid_space
from pytest_gpushare.leases import DEFAULT_WAIT
from pytest_gpushare.leases.claims import DeviceClaims, Processes, claims_of, names_device
from pytest_gpushare.leases.ledger import Ledger, LedgerError, LiveSession, sessions_in
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, ModelTurn, Seniority

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_gpushare.gpu.readings import LiveVram, Reading
    from pytest_gpushare.gpu.vendors import DeviceReader

T = TypeVar("T")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks at the ledger: the longer the wait, the longer the pause."""

_MOST_PAUSE = 1.0
"""The same for one that has many before it; well below the life of a ticket."""

_COMES_BACK = 5.0
"""Seconds for which VRAM is waited for that another session had, and that is still in use."""


class LiveReadings:
    """NVML within its time limits; a reading that came too late is none."""

    def __init__(self, live: LiveVram) -> None:
        self._live = live

    def memory(self) -> Mapping[str, Memory]:
        """See `DeviceReader`."""
        return _in_time(self._live.memory)

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        """See `DeviceReader`."""
        return _in_time(self._live.processes)


def _in_time(read: Callable[[float], Reading[T]]) -> Mapping[str, T]:
    asked = time.monotonic()
    reading = read(0.0)
    return reading.devices if reading.at >= asked else {}


class View(NamedTuple):
    """The ledger at one moment, as it is seen inside the gate."""

    sessions: Sequence[LiveSession] = ()
    """The other sessions."""
    claims: Mapping[str, DeviceClaims] = {}
    """What they claim, by the UUIDs of the devices that were asked about."""
    memory: Mapping[str, Memory] = {}
    """VRAM, read together with the processes; empty where it was not read."""
    processes: Mapping[str, tuple[GpuProcess, ...] | None] = {}
    ticket: int = 0
    """The own ticket; 0 where there is none."""


class Wish(NamedTuple):
    """What a session makes of a view."""

    devices: Mapping[str, DeviceLease]
    """By UUID. Without any lease among them the session waits for what it wants there."""
    is_explained: bool = False
    """Whether there would be enough without the leases of others."""
    granted: bool | None = None
    """Whether this is what the session waits for; None: any lease is."""

    @property
    def is_granted(self) -> bool:
        """Whether something is leased."""
        if self.granted is not None:
            return self.granted
        return any(share.lease for share in self.devices.values())


class Outcome(NamedTuple):
    """How a claim ended."""

    view: View
    is_granted: bool
    waited: float = 0.0
    """Seconds."""


class Revision(NamedTuple):
    """What a session that shares devices by the test leases after a look at the others."""

    devices: Mapping[str, DeviceLease]
    """By UUID."""
    waits_for: frozenset[tuple[str, int]] = frozenset()
    """Devices (UUID) and the tests that wait there; its place in the queue is kept as long as
    one of those is among them for which it was drawn."""


Decide = Callable[[View], Wish]
Report = Callable[[View, float], object]
"""Called while a session waits, with the seconds that it has waited."""


class Lessee:
    """The record of this session, and what it claims. Any thread may use it."""

    def __init__(
        self,
        ledger: Ledger,
        record: LeaseRecord,
        totals: Mapping[str, int],
        readings: DeviceReader | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`totals` are the devices that are shared, UUID -> bytes."""
        self.ledger = ledger
        self.record = record
        """What this session publishes of itself."""
        self.totals = totals
        """UUID -> bytes, of the devices that are shared."""
        self._readings = readings
        self._clock, self._sleep = clock, sleep
        self._lock = threading.RLock()
        self._waits_for: frozenset[tuple[str, int]] = frozenset()
        self._in_gate = 0.0
        """Seconds for which it held the gate when it last looked whether it gets its lease."""
        self._turn = 0
        """The ticket with which it waited for its start: its first test has the same one."""
        self.problem = ""
        """Why the ledger could not be used the last time; empty where it could."""

    def claim(self, decide: Decide, wait: float | None, report: Report) -> Outcome:
        """Lease what `decide` wants, once there is enough.

        `wait` is in seconds: an explicit limit; None waits `DEFAULT_WAIT` as long as leases
        explain the shortage, again whenever the other sessions make progress. Whatever becomes
        of it, nobody waits for the ledger itself. Raises `LedgerError`.
        """
        began = since = self._clock()
        explained = float("-inf")
        progress: object = None
        is_first = True
        while True:
            now = self._clock()
            view, wish = self._decide(decide, began, is_first=is_first)
            is_first = False
            if wish.is_granted:
                return Outcome(view, True, now - began)
            limit = wait
            if limit is None:
                explained = now if wish.is_explained else explained
                limit = DEFAULT_WAIT if now - explained < _COMES_BACK else 0.0
                current = progress_of(view.sessions)
                if current != progress:
                    progress, since = current, now
            if now - since >= limit:
                self.change(ticket=0, devices=_without_wants(self.record.devices))
                return Outcome(view, False, now - began)
            try:
                report(view, now - began)
                self._await_turn(view, began, since + limit)
            except EnoughElsewhereError:
                self.change(ticket=0, devices=_without_wants(self.record.devices))
                return Outcome(view, False, 0.0)
            except BaseException:
                self.leave()
                raise

    def _await_turn(self, view: View, began: float, until: float) -> None:
        """Wait until another look with the gate held is worth it.

        That is so for the first in the queue when a session that has leased something has
        changed that; any other one watches the session before it, without the gate, which is
        left to those who give something back. Now and then each has to renew its ticket, and
        may find that those before it can get nothing.
        """
        entered, found = self._clock(), view
        while True:
            ahead, watched = self._before(found)
            known = {session.name: session for session in found.sessions}
            renewal = _LONGEST_PAUSE * (1 + ahead / 4)
            while True:
                pause = self._pause(began)
                if not ahead and self._readings is not None:
                    # VRAM may come back without anybody writing a record; but the gate has to
                    # be free most of the time, also where the driver is slow.
                    renewal = max(pause, 5 * self._in_gate)
                due = min(entered + min(renewal, _MOST_PAUSE), until) - self._clock()
                self._sleep(max(0.0, min(pause, due)))
                if self._clock() >= min(entered + min(renewal, _MOST_PAUSE), until):
                    return
                if self.ledger.peek(watched) != {name: known.get(name) for name in watched}:
                    break
            found = self.look()
            if not self._before(found)[0]:
                return

    def _pause(self, began: float) -> float:
        waited = self._clock() - began
        return min(max(_SHORTEST_PAUSE, waited / 40), _LONGEST_PAUSE)

    def _before(self, view: View) -> tuple[int, Sequence[str]]:
        """How many asked before, on a device that this session waits for; and the records to
        watch: of the last of these, or of all that have leased something."""
        own = self.record
        claims = [claim for uuid, claim in view.claims.items() if own.lease(uuid).want]
        waiting = {w.ticket: w.seniority[1] for claim in claims for w in claim.waiting}
        before = [ticket for ticket in waiting if ticket < own.ticket]
        if before:
            return len(before), [waiting[max(before)]]
        return 0, [holder.session.name for claim in claims for holder in claim.holders]

    def _decide(self, decide: Decide, asked: float, *, is_first: bool) -> tuple[View, Wish]:
        with self._lock, self.ledger.gate():
            entered = self._clock()
            view = self.view(may_reuse=is_first)
            if is_first and not view.memory and self._readings is not None:
                # Who holds it takes milliseconds to read, and matters beside others only.
                view = view._replace(memory=self._readings.memory())
            wish = decide(view)
            self._in_gate = self._clock() - entered
            # Who has asked keeps its place also while it would be in an older one's way.
            waits = any(share.want for share in wish.devices.values()) or (
                bool(self.record.ticket) and wish.is_explained
            )
            self._turn = self.record.ticket or self._turn
            self._publish(view, wish.devices, asked if waits and not wish.is_granted else None)
        return view, wish

    def revise(self, decide: Callable[[View], Revision]) -> None:
        """Lease what `decide` says, which has no need to wait here.

        What it waits for keeps its ticket from one call to the next. Raises `LedgerError`, also
        after `decide` was called.
        """
        asked = self._clock()
        with self._lock, self.ledger.gate():
            view = self.view(may_reuse=True)
            if not self.record.since:
                self._begin_to_revise(view)
            revision = decide(view)
            if not revision.waits_for & self._waits_for:
                self._waits_for = revision.waits_for
                self.record = self.record._replace(ticket=self._turn)
                if revision.waits_for:
                    self._turn = 0
            self._publish(view, revision.devices, asked if revision.waits_for else None)

    def _begin_to_revise(self, view: View) -> None:
        """From now on this session is younger than all that lease by the test already.

        Those have been asked before whether each of them can run its largest test; when this one
        was started does not matter to that.
        """
        others = (session.record.since for session in view.sessions)
        since = max(time.time(), max(others, default=0.0) + 0.001)
        self.record = self.record._replace(since=since)

    def _publish(self, view: View, devices: Mapping[str, DeviceLease], asked: float | None) -> None:
        """Publish this; `asked` is since when it waits, None where it does not.

        The ticket is that time: several that come at once pass the gate in any order.
        """
        ticket = 0
        if asked is not None:
            others = {session.record.ticket for session in view.sessions}
            ticket = self.record.ticket or max(1, int(asked * 1e6))
            while ticket in others:
                ticket += 1
        self._write(self.record._replace(devices=devices, ticket=ticket, renewed=self._clock()))

    @property
    def seniority(self) -> Seniority:
        """This session among the others, as they read it."""
        path = self.ledger.record_path
        return self.record.seniority("" if path is None else path.name)

    def view(self, *, may_reuse: bool = False) -> View:
        """The others as they are now; to be called while the gate is held.

        `may_reuse`: NVML is not read where no other session names a device.
        """
        sessions = self.ledger.others()
        memory: Mapping[str, Memory] = {}
        processes: Mapping[str, tuple[GpuProcess, ...] | None] = {}
        names = names_device(sessions, self.totals)
        if self._readings is not None and (names or not may_reuse):
            memory, processes = _read(self._readings)
        claims = self._claims(sessions, processes, pid_space() or "")
        return View(sessions, claims, memory, processes, self.record.ticket)

    def _claims(
        self, sessions: Sequence[LiveSession], processes: Processes, space: str
    ) -> Mapping[str, DeviceClaims]:
        now = self._clock()
        return claims_of(sessions, self.totals, processes, space=space, now=now, ancestors=line_of)

    @property
    def claims_devices(self) -> bool:
        """Whether this session takes part with devices: not within the slot of another run."""
        return bool(self.totals)

    def look(self) -> View:
        """The others, without the gate and without NVML, for whoever only shows them."""
        sessions = self.ledger.look()
        return View(sessions, self._claims(sessions, {}, ""))

    def models_of_others(self) -> frozenset[str]:
        """The models of Ollama's that other sessions use, by full name."""
        return _models_of(self.ledger.look())

    def take_turn(self, decide: Callable[[Sequence[LiveSession]], Sequence[ModelTurn]]) -> None:
        """Publish the turns that `decide` makes of the other sessions. Raises `LedgerError`."""
        with self._lock, self.ledger.gate():
            turns = tuple(decide(self.ledger.others()))
            self._write(self.record._replace(turns=turns, renewed=self._clock()))

    def change(self, **fields: object) -> bool:
        """Publish other values of fields of the record. Returns whether that was possible.

        What could not be written is written with the next change.
        """
        with self._lock:
            self.record = self.record._replace(**fields)  # type: ignore[arg-type]
            try:
                with self.ledger.gate():
                    self._write(self.record)
            except LedgerError as error:
                self.problem = str(error)
                return False
        return True

    def shrink(self, leases: Mapping[str, int]) -> bool:
        """Give back all but these bytes, by UUID."""
        with self._lock:
            devices = {
                uuid: share._replace(lease=min(share.lease, leases.get(uuid, 0)))
                for uuid, share in self.record.devices.items()
            }
            return devices == self.record.devices or self.change(devices=devices)

    def leave(self) -> None:
        """Give everything back; harmless when called twice."""
        with self._lock:
            self.record = self.record._replace(devices={}, ticket=0, turns=())
            self.ledger.leave()

    def close(self) -> None:
        """Leave the ledger for good."""
        self.leave()
        self.ledger.close()

    def _write(self, record: LeaseRecord) -> None:
        self.record = record
        self.ledger.publish(record)
        self.problem = ""


def models_in_use(directory: Path) -> frozenset[str]:
    """The models of Ollama's that sessions use, by full name, before this one takes part."""
    return _models_of(sessions_in(directory))


def _models_of(sessions: Iterable[LiveSession]) -> frozenset[str]:
    names = (name for session in sessions for name in session.record.models)
    return frozenset(name if ":" in name else f"{name}:latest" for name in names)


def _read(
    readings: DeviceReader,
) -> tuple[Mapping[str, Memory], Mapping[str, tuple[GpuProcess, ...] | None]]:
    """VRAM, and who holds it, as of one moment.

    What is taken or given back meanwhile must not count as free and as held at once: so the
    memory is read before and after the processes, and the smaller figure holds.
    """
    before = readings.memory()
    processes = readings.processes()
    after = readings.memory()
    # A device that could not be read twice is left out: its figures at the start have to do.
    both = {uuid: min(before[uuid], after[uuid], key=_free) for uuid in before.keys() & after}
    return both, processes


def _free(memory: Memory) -> int:
    return memory.free


def _without_wants(devices: Mapping[str, DeviceLease]) -> Mapping[str, DeviceLease]:
    return {uuid: share._replace(want=0) for uuid, share in devices.items()}


def progress_of(sessions: Iterable[LiveSession]) -> object:
    """What changes when other sessions make progress: tests they have done, and VRAM they lease."""
    return frozenset(
        (session.name, session.record.done, session.record.leased)
        for session in sessions
        if session.record.leased
    )


class EnoughElsewhereError(Exception):
    """The session waits for VRAM here no longer: it has some on another host."""
