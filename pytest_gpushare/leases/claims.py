"""What the sessions of a host claim of each device: pure arithmetic over their records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.gpu.devices import GpuProcess
from pytest_gpushare.leases.ledger import LiveSession
from pytest_gpushare.leases.records import Seniority
from pytest_gpushare.units import format_gb

TICKET_LIFE = 5.0
"""Seconds for which a ticket counts after it was renewed: a stopped session blocks nobody."""


class Waiting(NamedTuple):
    """A session that asked earlier."""

    ticket: int
    want: int
    """Bytes, beside those that it has leased."""
    seniority: Seniority = (0.0, "")
    is_fixed: bool = False
    """Whether it would keep them for as long as it lives, as one does that only starts."""
    reserved: int = 0
    """What it would keep for Ollama then."""


class Share(NamedTuple):
    """What a session has of one device; see `records.DeviceLease`. Sizes in bytes."""

    seniority: Seniority = (0.0, "")
    kept: int = 0
    """What of its lease it does not give back as its tests end."""
    spare: int = 0
    idle: int = 0
    most: int = 0


NEWCOMER = Share((math.inf, ""))
"""A starting session. It counts as younger than all; otherwise two sessions could wait for each
other."""


class Holder(NamedTuple):
    """A session that has leased VRAM of a device, or holds some as its workers end."""

    session: LiveSession
    lease: int
    """Bytes, never more than the device has."""
    held: int | None
    """What its processes hold of it; None where no PID can be compared."""

    @property
    def unclaimed(self) -> int:
        """Bytes that it may still take."""
        return max(0, self.lease - (self.held or 0))


class DeviceClaims(NamedTuple):
    """What the other sessions claim of one device."""

    holders: tuple[Holder, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    """The oldest ticket first."""
    reserved: int = 0
    """The largest reservation for Ollama that one of them publishes."""
    shares: tuple[Share, ...] = ()
    """What they have, the oldest session first."""
    counts_twice: bool = False
    """Whether nobody knows which VRAM in use is leased: then it is missing once as used, and once
    as leased by others."""

    @property
    def leased(self) -> int:
        """Bytes that they have leased and not yet taken."""
        return sum(holder.unclaimed for holder in self.holders)

    @property
    def held(self) -> int:
        """Bytes that they hold, as far as that is known."""
        return sum(holder.held or 0 for holder in self.holders)

    @property
    def spare(self) -> int:
        """Bytes that they give back to one that waits, as their tests end."""
        return sum(share.spare for share in self.shares)

    def ahead(
        self,
        room: int,
        ticket: int = 0,
        own: Share | None = None,
        capacity: int | None = None,
        reserved: int = 0,
        *,
        starts: int | None = None,
    ) -> int:
        """Bytes of the room that are kept for those who asked before.

        `ticket` is the own one, 0 for a session without one. One that cannot be satisfied, not
        even with what the others give back as their tests end and younger ones with workers
        that they can do without, keeps nothing. Nor does a younger one that has to wait until an
        older session has run its largest test; `capacity` is what the device has for all.
        `reserved` is what the reader keeps for Ollama, which is not in the room. `starts` is the
        capacity for one that only starts: it takes nothing at all before those that do, too, and
        have asked before, since each takes all that is there.
        """
        kept, own = 0, own or Share()
        spare = self.spare + own.spare
        room = self._for_others(room, own)
        for waiting in self.waiting:
            if ticket and waiting.ticket >= ticket:
                break
            may_pass = capacity is not None and own.seniority < waiting.seniority
            if may_pass and self._has_to_wait(waiting, own, capacity or 0):
                continue
            idle = sum(s.idle for s in (*self.shares, own) if s.seniority > waiting.seniority)
            # It starts beside what it keeps for Ollama itself.
            more = max(0, waiting.reserved - max(reserved, self.reserved))
            if waiting.want + more <= room + spare + idle - kept:
                kept += waiting.want + more
                if starts is not None and waiting.is_fixed and self._may_start(waiting, starts):
                    return max(room, kept)
        return kept

    def _may_start(self, waiting: Waiting, capacity: int) -> bool:
        keepable = self.keepable(capacity, Share(waiting.seniority))
        return keepable is None or waiting.want <= keepable

    def _has_to_wait(self, waiting: Waiting, own: Share, capacity: int) -> bool:
        kept, weight = waiting.want, 1 + self.counts_twice
        for share in sorted((*self.shares, own), reverse=True):
            needs_more = share.seniority < waiting.seniority and share.most > share.kept
            if waiting.is_fixed and needs_more and share.most + weight * kept > capacity:
                return True
            kept += share.kept
        return False

    def keepable(self, capacity: int, own: Share) -> int | None:
        """Bytes that this session may keep between its tests, beyond what it keeps already.

        So many that each older one can still run its largest test, whatever those keep that are
        younger: that is never given back while they live. `capacity` is what the device has for
        the tests of all sessions. None: no older session has such a test.
        """
        kept = own.kept + sum(s.kept for s in self.shares if s.seniority > own.seniority)
        weight = 1 + self.counts_twice
        least: int | None = None
        for share in reversed(self.shares):
            if share.seniority > own.seniority:
                continue
            # One that needs no more than it has is in nobody's way but by that.
            if share.most > share.kept:
                left = (capacity - share.most) // weight - kept
                least = left if least is None else min(least, left)
            kept += share.kept
        return least

    def owed(self, room: int, own: Share, want: int = 0) -> int:
        """Bytes that this session is to free for an older one that waits, by ending workers.

        What comes back as tests end is waited for; the youngest sessions free theirs first. A
        session that lacks `want`, and cannot have it while younger ones live, lets those go on.
        """
        is_stuck = self._missing(room, own, want) > 0
        wants = [w.want for w in self.waiting if is_stuck or w.seniority < own.seniority]
        room = self._for_others(room, own)
        return min(own.idle, self._missing(room, own, max(wants, default=0)))

    def lacks(self, room: int, own: Share, want: int) -> int:
        """Bytes that a test of this session lacks, and that no other one gives back."""
        return min(own.idle, self._missing(room, own, want))

    def _for_others(self, room: int, own: Share) -> int:
        """The room as other sessions see it, at least."""
        return room - own.kept if self.counts_twice else room

    def _missing(self, room: int, own: Share, want: int) -> int:
        idle = sum(s.idle for s in self.shares if s.seniority > own.seniority)
        return max(0, want - room - self.spare - own.spare - idle)


NOTHING = DeviceClaims()

Processes = Mapping[str, Sequence[GpuProcess] | None]
"""UUID -> who holds VRAM there; None, or missing, where the driver does not report it."""


def claims_of(
    sessions: Iterable[LiveSession],
    totals: Mapping[str, int],
    processes: Processes,
    *,
    space: str,
    now: float,
    ancestors: Callable[[int], Sequence[int]],
) -> Mapping[str, DeviceClaims]:
    """UUID -> what these sessions claim, for each device in `totals`.

    `space` is where the reader's PIDs hold: only sessions of the same place can be found in
    the list of processes. `ancestors` gives a process and those that started it.
    """
    known = _with_what_tests_lease(list(sessions))
    owners: dict[int, str] = {}
    for session in known:
        record = session.record
        if space and record.space == space:
            owners.setdefault(record.pid, session.name)
            owners.update((worker.pid, session.name) for worker in record.workers if worker.pid)
    return {
        uuid: _claims_on(uuid, total, known, _held(processes.get(uuid), owners, ancestors), now)
        for uuid, total in totals.items()
    }


def _with_what_tests_lease(sessions: Sequence[LiveSession]) -> Sequence[LiveSession]:
    """The sessions, each with what its workers have leased by themselves, beyond their slots.

    What such a process holds is in use for both leases, and cannot be separated.
    """
    runs = {
        (session.record.space, worker.pid): session.name
        for session in sessions
        for worker in session.record.workers
    }
    more: dict[str, Counter[str]] = {}
    found = []
    for session in sessions:
        record = session.record
        run = runs.get((record.space, record.pid))
        if run is None or run == session.name:
            found.append(session)
            continue
        sizes = {uuid: share.lease for uuid, share in record.devices.items()}
        more.setdefault(run, Counter()).update(sizes)
        rest = {uuid: share._replace(lease=0) for uuid, share in record.devices.items()}
        found.append(session._replace(record=record._replace(devices=rest)))
    if not more:
        return sessions
    return [
        session._replace(record=session.record.with_more(more[session.name]))
        if session.name in more
        else session
        for session in found
    ]


def _claims_on(
    uuid: str,
    total: int,
    sessions: Sequence[LiveSession],
    held: Mapping[str, int] | None,
    now: float,
) -> DeviceClaims:
    holders, waiting, shares = [], [], []
    reserved = 0
    for session in sessions:
        record = session.record
        if uuid not in record.devices:
            continue
        published, seniority = record.lease(uuid), record.seniority(session.name)
        lease = min(published.lease, total)
        if published.want and not (lease or record.since):
            seniority = NEWCOMER.seniority[0], session.name
        if lease or record.since or not record.ticket:
            # One that waits for its start runs nothing beside which a model has to stay.
            reserved = max(reserved, min(published.reserved, total))
        found = None if held is None else held.get(session.name, 0)
        if lease or found:
            holders.append(Holder(session, lease, found))
        is_waiting = record.ticket and abs(now - record.renewed) <= TICKET_LIFE
        if is_waiting and published.want:
            waiting.append(
                Waiting(
                    record.ticket,
                    published.want,
                    seniority,
                    is_fixed=not published.most,
                    reserved=published.reserved,
                )
            )
        if lease or is_waiting:
            spare = min(published.spare, lease)
            kept, most = lease - spare, min(published.most, total)
            shares.append(Share(seniority, kept, spare, min(published.idle, kept), most))
    return DeviceClaims(
        tuple(holders),
        tuple(sorted(waiting)),
        reserved,
        tuple(sorted(shares)),
        counts_twice=held is None,
    )


def _held(
    processes: Sequence[GpuProcess] | None,
    owners: Mapping[int, str],
    ancestors: Callable[[int], Sequence[int]],
) -> Mapping[str, int] | None:
    """Session -> bytes that it and its descendants hold; None where that is unknown."""
    if processes is None or any(process.used is None for process in processes):
        return None
    found: dict[str, int] = {}
    for process in processes:
        line = ancestors(process.pid)
        if not line:
            # The driver's PIDs are those of another namespace: none of them can be compared.
            return None
        owner = next((owners[pid] for pid in line if pid in owners), None)
        if owner is not None:
            found[owner] = found.get(owner, 0) + (process.used or 0)
    return found


def names_device(sessions: Iterable[LiveSession], uuids: Iterable[str]) -> bool:
    """Whether one of the sessions claims, or waits for, one of these devices."""
    wanted = set(uuids)
    return any(wanted & session.record.devices.keys() for session in sessions)


class Naming(NamedTuple):
    """How other sessions are named to the user."""

    shows_everybody: bool = True
    """Whether sessions of other users are named, too."""

    def session(self, session: LiveSession) -> str:
        """`pid 1234, ci, in /srv/a`."""
        if session.is_mine:
            return f"pid {session.record.pid}, {session.owner}, in {session.record.root}"
        if not self.shows_everybody:
            return "another user"
        root = session.record.root.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return f"pid {session.record.pid}, {session.owner}, in {root}"

    def holder(self, holder: Holder, wall_clock: float) -> str:
        """`pid 1234, ci, in /srv/a: 9.0 GB for 3 min, 412 of 1,000 tests done`."""
        record = holder.session.record
        size = format_gb(holder.lease or holder.held or 0)
        minutes = max(0, int((wall_clock - record.began) / 60))
        since = f" for {minutes} min" if minutes else ""
        done = f", {record.done:,} of {record.total:,} tests done" if record.total else ""
        return f"{self.session(holder.session)}: {size}{since}{done}"

    def holders(self, claims: DeviceClaims, wall_clock: float) -> str:
        """All that hold or lease VRAM of a device; empty: nobody does."""
        return "; ".join(self.holder(holder, wall_clock) for holder in claims.holders)
