"""Several sessions on the same devices: their dispatchers, and the ledger as values.

Each session is a `world.World` of its own; the clock, the devices and the records are common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop

from pytest_gpushare.gpu.devices import GpuProcess
from pytest_gpushare.leases.claims import DeviceClaims, claims_of
from pytest_gpushare.leases.ledger import LiveSession
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, SessionWorker
from pytest_gpushare.scheduler.sharing import lease_on, others_on
from pytest_gpushare.scheduler.types import (
    NOBODY,
    DeviceCapacity,
    DeviceReading,
    Job,
    Policy,
    Worker,
)

from .world import Device, Script, World

POLL = 0.25
"""Seconds after which a session that waits looks at the others."""


class Session(World):
    """One of several sessions."""

    def __init__(
        self,
        host: Host,
        number: int,
        jobs: Sequence[Job],
        rooms: Sequence[DeviceCapacity],
        workers: Sequence[Worker],
        scripts: Mapping[int, Script],
        policy: Policy | None = None,
        *,
        by_pid: bool = True,
    ) -> None:
        self.host, self.number = host, number
        self.record = LeaseRecord(number + 1, "here", began=float(number))
        self._waits_for: frozenset[tuple[str, int]] = frozenset()
        self.is_over = False
        super().__init__(
            jobs, rooms, workers, scripts=scripts, devices=host.devices, policy=policy,
            by_pid=by_pid,
        )  # fmt: skip
        host.sessions.append(self)

    @property
    def name(self) -> str:
        return f"s-{self.number:03}"

    def pid(self, worker: str) -> int:
        """The process of a worker."""
        return 1000 * (self.number + 1) + int(worker.removeprefix("gw"))

    def happen(self) -> None:
        """The next of its events."""
        _, _, happen, arguments = heappop(self._events)
        happen(*arguments)

    def held_by_all(self, device: str) -> int:
        return sum(p.held.get(device, 0) for p in self.processes.values())

    def _free(self, device: str) -> int:
        held = sum(session.held_by_all(device) for session in self.host.sessions)
        return self.devices[device].free(held, self.now)

    def _readings(self) -> dict[str, DeviceReading]:
        found = super()._readings()
        own, result = self.dispatcher.shares(), {}
        for uuid, room in self.rooms.items():
            claims = self.host.claims(self, uuid)
            reading = found.get(uuid, DeviceReading())
            seniority = self.record.seniority(self.name)
            others = others_on(room, reading, claims, own[uuid], seniority, self.record.ticket)
            others = others._replace(progress=self.host.progress(self), names="others")
            result[uuid] = reading._replace(others=others if claims.shares else NOBODY)
        return result

    def _step(self) -> None:
        self.dispatcher.prepare(self.now)
        super()._step()
        self.publish()
        self.host.check()

    def publish(self) -> None:
        """As `dispatch.leases_by_test` does it, always beside others."""
        own = self.dispatcher.shares()
        waits = frozenset((u, s.waits_for) for u, s in own.items() if s.waits_for is not None)
        ticket = self.record.ticket
        if not waits & self._waits_for:
            self._waits_for, ticket = waits, 0
        if waits and not ticket:
            ticket = 1 + max(session.record.ticket for session in self.host.sessions)
        devices: dict[str, DeviceLease] = {
            uuid: lease_on(room, own[uuid], is_shared=True) for uuid, room in self.rooms.items()
        }
        self.record = self.record._replace(
            devices=devices,
            ticket=ticket if waits else 0,
            renewed=self.now,
            done=len(self.outcomes),
            workers=tuple(
                SessionWorker(name, self.pid(name), "gpu", None, 0)
                for name, process in self.processes.items()
                if process.alive
            ),
        )

    def end(self) -> None:
        """All its workers are gone, and its record."""
        self.is_over = True
        for process in self.processes.values():
            process.alive = False
            process.held.clear()


class Host:
    """The devices and the sessions on them."""

    def __init__(self, devices: dict[str, Device]) -> None:
        self.devices = devices
        self.sessions: list[Session] = []
        self.wrong: list[str] = []
        self.now = 0.0
        self.most_in_use = 0

    def claims(self, reader: Session, uuid: str) -> DeviceClaims:
        """What the others claim, as this one reads it."""
        others = [s for s in self.sessions if s is not reader and not s.is_over]
        processes = tuple(
            GpuProcess(session.pid(name), size)
            for session in others
            for name, process in session.processes.items()
            if (size := process.held.get(uuid, 0))
        )
        return claims_of(
            [LiveSession(s.name, None, s.record) for s in others],
            {uuid: self.devices[uuid].total},
            {uuid: processes if reader.by_pid else None},
            space="here",
            now=reader.now,
            ancestors=lambda pid: [pid],
        )[uuid]

    def progress(self, reader: Session) -> int:
        """A number that grows with the tests of the others."""
        return sum(len(s.outcomes) for s in self.sessions if s is not reader)

    def check(self) -> None:
        """No more is leased, or held without a lease, than there is."""
        for uuid, device in self.devices.items():
            held = {s.number: s.held_by_all(uuid) for s in self.sessions if not s.is_over}
            claimed = sum(
                max(s.record.lease(uuid).lease, held[s.number])
                for s in self.sessions
                if not s.is_over
            )
            budget = device.total - device.ollama - device.others(self.now)
            if claimed > budget:
                self.wrong.append(f"{claimed} of {budget} leased on {uuid} at {self.now}")
            self.most_in_use = max(self.most_in_use, sum(held.values()))

    def run(self, starts: Sequence[float] = (), patience: float = 300.0) -> Host:
        """Until every session is over; each begins at its time."""
        began: set[int] = set()
        done, since = 0, 0.0
        looks = dict.fromkeys(range(len(self.sessions)), 0.0)
        while any(not session.is_over for session in self.sessions):
            due: list[tuple[float, int, str]] = []
            for session in self.sessions:
                if session.is_over:
                    continue
                number = session.number
                if number not in began:
                    due.append((starts[number] if starts else 0.0, number, "begin"))
                    continue
                if session._events:
                    due.append((session._events[0][0], number, "event"))
                due.append((looks[number], number, "look"))
            at, number, what = min(due)
            session = self.sessions[number]
            self.now = max(self.now, at)
            session.now = self.now
            if done != (done := sum(len(each.outcomes) for each in self.sessions)):
                since = self.now
            state = [each.record for each in self.sessions if not each.is_over]
            assert self.now < since + patience, f"nothing goes on: {state}"
            if what == "begin":
                began.add(number)
                # Who leases by the test since longer is the older one.
                session.record = session.record._replace(since=self.now + number / 1e6)
                session._step()
            elif what == "event":
                session.happen()
            else:
                session._step()
            looks[number] = self.now + POLL
            if session.dispatcher.is_done:
                session.end()
        return self
