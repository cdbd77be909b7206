"""One session's side of the ledger: it claims VRAM, waits for it, and gives it back."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.host import parent_of, pid_space
from pytest_gpushare.leases.claims import DeviceClaims, claims_of, names_device
from pytest_gpushare.leases.ledger import Ledger, LedgerError, LiveSession
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord

if TYPE_CHECKING:
    from pytest_gpushare.gpu.sampler import LiveVram

DEFAULT_WAIT = 300.0
"""Seconds without progress of the others for which VRAM that they lease is waited for."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.25
"""Seconds between two looks at the ledger: the longer the wait, the longer the pause."""

_MOST_PAUSE = 1.0
"""The same for one that has many before it; well below the life of a ticket."""

LOG_INTERVAL = 60.0
"""Seconds between two lines of one that waits and writes to a log."""


_MOST_GENERATIONS = 64


class Readings(Protocol):
    """NVML, each call with a time limit of its own."""

    def memory(self) -> Mapping[str, Memory]:
        """UUID -> VRAM now."""

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        """UUID -> who holds VRAM there now."""


class LiveReadings:
    """NVML within its time limits; a reading that came too late is none."""

    def __init__(self, live: LiveVram) -> None:
        self._live = live

    def memory(self) -> Mapping[str, Memory]:
        """See `Readings`."""
        asked = time.monotonic()
        reading = self._live.memory(0.0)
        return reading.devices if reading.at >= asked else {}

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        """See `Readings`."""
        asked = time.monotonic()
        reading = self._live.processes(0.0)
        return reading.devices if reading.at >= asked else {}


class View(NamedTuple):
    """The ledger at one moment, as it is seen inside the gate."""

    sessions: Sequence[LiveSession] = ()
    """The other sessions."""
    claims: Mapping[str, DeviceClaims] = {}
    """What they claim, by the UUIDs of the devices that were asked about."""
    memory: Mapping[str, Memory] | None = None
    """VRAM, read together with the processes; None where it was not read."""
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
        readings: Readings | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`totals` are the devices that are shared, UUID -> bytes."""
        self.ledger = ledger
        self._record = record
        self._totals, self._readings = totals, readings
        self._clock, self._sleep = clock, sleep
        self._lock = threading.RLock()
        self.problem = ""
        """Why the ledger could not be used the last time; empty where it could."""

    @property
    def record(self) -> LeaseRecord:
        """What this session publishes of itself."""
        return self._record

    def claim(self, decide: Decide, wait: float | None, report: Report) -> Outcome:
        """Lease what `decide` wants, once there is enough.

        `wait` is in seconds: an explicit limit; None waits `DEFAULT_WAIT` as long as leases
        explain the shortage, again whenever the other sessions make progress. Whatever becomes
        of it, nobody waits for the ledger itself. Raises `LedgerError`.
        """
        began = since = self._clock()
        progress: object = None
        while True:
            now = self._clock()
            view, wish = self._decide(decide, is_first=now == began)
            if wish.is_granted:
                return Outcome(view, True, now - began)
            limit = wait
            if limit is None:
                limit = DEFAULT_WAIT if wish.is_explained else 0.0
                current = _progress(view.sessions)
                if current != progress:
                    progress, since = current, now
            if now - since >= limit:
                self.change(ticket=0, devices=_without_wants(self._record.devices))
                return Outcome(view, False, now - began)
            try:
                report(view, now - began)
                self._sleep(self._pause(view, now - began))
            except BaseException:
                self.leave()
                raise

    def _pause(self, view: View, waited: float) -> float:
        pause = min(max(_SHORTEST_PAUSE, waited / 20), _LONGEST_PAUSE)
        before = {w.ticket for c in view.claims.values() for w in c.waiting}
        ahead = sum(ticket < self._record.ticket for ticket in before)
        return min(pause * (1 + ahead / 2), _MOST_PAUSE)

    def _decide(self, decide: Decide, *, is_first: bool) -> tuple[View, Wish]:
        with self._lock, self.ledger.gate():
            view = self.view(may_reuse=is_first)
            wish = decide(view)
            ticket = 0
            if not wish.is_granted and any(share.want for share in wish.devices.values()):
                others = (s.record.ticket for s in view.sessions if s.record is not None)
                ticket = self._record.ticket or max(others, default=0) + 1
            self._write(
                self._record._replace(devices=wish.devices, ticket=ticket, renewed=self._clock())
            )
        return view, wish

    def view(self, *, may_reuse: bool = False) -> View:
        """The others as they are now; to be called while the gate is held.

        `may_reuse`: NVML is not read where no other session names a device.
        """
        sessions = self.ledger.others()
        memory: Mapping[str, Memory] | None = None
        processes: Mapping[str, tuple[GpuProcess, ...] | None] = {}
        names = names_device(sessions, self._totals)
        if self._readings is not None and (names or not may_reuse):
            memory, processes = _read(self._readings, with_processes=names)
        claims = claims_of(
            sessions,
            self._totals,
            processes,
            space=pid_space() or "",
            now=self._clock(),
            ancestors=_line_of,
        )
        return View(sessions, claims, memory, processes, self._record.ticket)

    @property
    def claims_devices(self) -> bool:
        """Whether this session takes part with devices: not within the slot of another run."""
        return bool(self._totals)

    def look(self) -> View:
        """The others, without the gate and without NVML, for whoever only shows them."""
        sessions = self.ledger.look()
        claims = claims_of(
            sessions, self._totals, {}, space="", now=self._clock(), ancestors=_line_of
        )
        return View(sessions, claims)

    def models_of_others(self) -> frozenset[str]:
        """The models of Ollama's that other sessions use, by full name."""
        records = (session.record for session in self.ledger.look())
        names = (name for record in records if record is not None for name in record.models)
        return frozenset(name if ":" in name else f"{name}:latest" for name in names)

    def change(self, **fields: object) -> bool:
        """Publish other values of fields of the record. Returns whether that was possible.

        What could not be written is written with the next change.
        """
        with self._lock:
            self._record = self._record._replace(**fields)  # type: ignore[arg-type]
            try:
                with self.ledger.gate():
                    self._write(self._record)
            except LedgerError as error:
                self.problem = str(error)
                return False
        return True

    def shrink(self, leases: Mapping[str, int]) -> bool:
        """Give back all but these bytes, by UUID."""
        with self._lock:
            devices = {
                uuid: share._replace(lease=min(share.lease, leases.get(uuid, 0)))
                for uuid, share in self._record.devices.items()
            }
            return devices == self._record.devices or self.change(devices=devices)

    def is_lost(self) -> bool:
        """Whether somebody has removed the record, so that it must be published again."""
        return self.ledger.is_lost()

    def leave(self) -> None:
        """Give everything back; harmless when called twice."""
        with self._lock:
            self._record = self._record._replace(devices={}, ticket=0)
            self.ledger.leave()

    def close(self) -> None:
        """Leave the ledger for good."""
        self.leave()
        self.ledger.close()

    def _write(self, record: LeaseRecord) -> None:
        self._record = record
        self.ledger.publish(record)
        self.problem = ""


def _line_of(pid: int) -> Sequence[int]:
    """A process and those that started it; empty for one that is not found here."""
    line: list[int] = []
    above = parent_of(pid)
    while above is not None and len(line) < _MOST_GENERATIONS:
        line.append(pid)
        if above <= 1:
            break
        pid, above = above, parent_of(above)
    return line


def _read(
    readings: Readings, *, with_processes: bool
) -> tuple[Mapping[str, Memory], Mapping[str, tuple[GpuProcess, ...] | None]]:
    """VRAM, and who holds it, as of one moment.

    What is taken or given back meanwhile must not count as free and as held at once: so the
    memory is read before and after the processes, and the smaller figure holds.
    """
    before = readings.memory()
    if not with_processes:
        return before, {}
    processes = readings.processes()
    after = readings.memory()
    # A device that could not be read twice is left out: its figures at the start have to do.
    both = {uuid: min(before[uuid], after[uuid], key=_free) for uuid in before.keys() & after}
    return both, processes


def _free(memory: Memory) -> int:
    return memory.free


def _without_wants(devices: Mapping[str, DeviceLease]) -> Mapping[str, DeviceLease]:
    return {uuid: share._replace(want=0) for uuid, share in devices.items()}


def _progress(sessions: Iterable[LiveSession]) -> object:
    """What changes when other sessions get on: their tests done, and what they have leased."""
    return frozenset(
        (session.name, session.record.done, session.record.leased)
        for session in sessions
        if session.record is not None and session.record.leased
    )


class WaitingLine:
    """Says on standard error that the session waits: one line that changes, or a line a minute."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._clock = clock
        self._width = 0
        self._next = float("-inf")

    def show(self, text: str) -> None:
        """What is waited for; `text` is one line."""
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._is_terminal:
                self._stream.write(f"\r{text.ljust(self._width)}")
                self._width = len(text)
            elif self._clock() >= self._next:
                self._stream.write(f"{text}\n")
                self._next = self._clock() + LOG_INTERVAL
            self._stream.flush()

    def clear(self) -> None:
        """Leave the line of a terminal empty."""
        if self._stream is not None and self._width:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(f"\r{' ' * self._width}\r")
                self._stream.flush()
