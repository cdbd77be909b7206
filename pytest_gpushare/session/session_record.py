"""The running sessions of this host: what this one publishes in the ledger, and who else runs.

`pytest-gpushare watch` finds the sessions here; other sessions find their leases.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.leases.ledger import default_directory, sessions_in
from pytest_gpushare.leases.records import SessionWorker
from pytest_gpushare.planning.leasing import slots_by_device

if TYPE_CHECKING:
    from pytest_gpushare.leases.lessee import Lessee, View
    from pytest_gpushare.planning.plan import Plan
    from pytest_gpushare.session.tests import RecordedTests
    from pytest_gpushare.session.workers import WorkerRecord
    from pytest_gpushare.wire import Links

INTERVAL = 0.5
"""Seconds between two looks at what has changed in this session."""

MOST_LEASES = 2000
"""Leases of other sessions that are kept; then the last ones last, with their largest size."""

_LOOK = 0.1
"""Seconds between two looks for other sessions, while leases are made by the test."""

LEASE = "lease"
"""The kind of message that names the record which a worker keeps alive."""


class RunningSession(NamedTuple):
    """A running session, as `watch` shows it."""

    pid: int
    root: str
    began: float
    """Seconds since the epoch."""
    workers: tuple[SessionWorker, ...] = ()
    owner: str = ""
    """The user; empty: the one who asks."""
    leases: Mapping[str, int] = {}
    """UUID -> bytes."""
    done: int = 0
    total: int = 0
    is_waiting: bool = False


def sessions(directory: Path | None = None) -> list[RunningSession]:
    """The sessions that run now, the oldest first."""
    found = [
        RunningSession(
            record.pid,
            record.root if session.is_mine else Path(record.root).name,
            record.began,
            _sorted(record.workers),
            "" if session.is_mine else session.owner,
            {uuid: share.lease for uuid, share in record.devices.items() if share.lease},
            record.done,
            record.total,
            bool(record.ticket),
        )
        for session in sessions_in(directory or default_directory())
        for record in (session.record,)
        if not session.problem
    ]
    return sorted(found, key=lambda session: (session.began, session.pid))


def _sorted(workers: Sequence[SessionWorker]) -> tuple[SessionWorker, ...]:
    """`gw2` before `gw10`."""
    return tuple(sorted(workers, key=lambda worker: (len(worker.id), worker.id)))


class OtherLease(NamedTuple):
    """What another session had leased of a device for some time."""

    device: str
    """UUID."""
    session: str
    """As reports name it."""
    begin: float
    """Seconds since the start of the run."""
    end: float
    size: int
    """Bytes."""


class OtherLeases:
    """The leases of other sessions over time, as seen now and then."""

    def __init__(self, naming: Naming, since_start: Callable[[], float]) -> None:
        """`since_start`: seconds since the start of the run."""
        self._naming, self._since_start = naming, since_start
        self._found: list[OtherLease] = []
        self._open: dict[tuple[str, str], int] = {}
        """Device and record -> place of the lease that lasts."""

    def see(self, view: View) -> None:
        """Note what is leased now: the same as before goes on."""
        now, seen = self._since_start(), dict[tuple[str, str], int]()
        for uuid, claims in view.claims.items():
            for holder in claims.holders:
                key = uuid, holder.session.name
                at = self._open.get(key)
                last = None if at is None else self._found[at]
                if last is not None and at is not None:
                    is_full = len(self._found) >= MOST_LEASES
                    size = max(last.size, holder.lease) if is_full else last.size
                    self._found[at] = last._replace(end=now, size=size)
                if last is None or (last.size != holder.lease and len(self._found) < MOST_LEASES):
                    at = len(self._found)
                    name = self._naming.session(holder.session)
                    self._found.append(OtherLease(uuid, name, now, now, holder.lease))
                seen[key] = at if at is not None else 0
        self._open = seen

    def __iter__(self) -> Iterator[OtherLease]:
        """The leases in the order in which they were seen first."""
        return iter(list(self._found))


class SessionRecord:
    """The service that keeps this session's record up to date, and gives slots back."""

    def __init__(
        self,
        lessee: Lessee,
        plan: Plan,
        workers: Callable[[], Sequence[WorkerRecord]],
        tests: RecordedTests,
        links: Links,
        others: OtherLeases,
    ) -> None:
        """`others` notes what other sessions have leased."""
        self._lessee, self._others = lessee, others
        self._plan, self._workers, self._tests, self._links = plan, workers, tests, links
        self._by_needs = False
        self._look: Callable[[], object] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> str:
        """The file that a worker keeps alive; empty where there is none."""
        path = self._lessee.ledger.record_path
        return "" if path is None else str(path)

    def admits_by_needs(self) -> None:
        """Tests are admitted by needs of their own from now on."""
        self._by_needs = True

    @property
    def is_by_the_test(self) -> bool:
        """Whether the dispatch leases what each test needs."""
        return self._look is not None

    def look_with(self, look: Callable[[], object]) -> None:
        """From now on the dispatch leases; `look` is called now and then for other sessions."""
        self._look = look

    def start(self) -> None:
        """Publish the workers and the tests from now on."""
        self._thread = threading.Thread(target=self._serve, name="gpu-share-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Remove the record: the tests are over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)
        self._lessee.leave()

    def _serve(self) -> None:
        before = None
        while True:
            # Nobody waits for this thread: whatever fails here is tried again.
            with contextlib.suppress(Exception):
                path = self.path
                now = self._seen()
                self._shrink(self._workers())
                if self._lessee.claims_devices:
                    self._others.see(self._lessee.look())
                if now != before or self._lessee.ledger.is_lost():
                    if self._lessee.change(**now):
                        before = now
                    if self.path != path:
                        self._send_path()
            if self._has_stopped():
                return

    def _has_stopped(self) -> bool:
        """Wait until the next time to publish, and look for other sessions meanwhile."""
        until = time.monotonic() + INTERVAL
        while (left := until - time.monotonic()) > 0:
            look = self._look
            if self._stop.wait(left if look is None else min(_LOOK, left)):
                return True
            if look is not None:
                with contextlib.suppress(Exception):
                    look()
        return self._stop.is_set()

    def _send_path(self) -> None:
        for member in self._workers():
            if member.ended is None:
                self._links.send(member.id, LEASE, self.path)

    def _seen(self) -> dict[str, object]:
        """The fields of the record as they are now."""
        members = self._workers()
        total = self._tests.total
        seen: dict[str, object] = {
            "workers": tuple(
                SessionWorker(m.id, m.pid, m.role, m.device, m.slot)
                for m in members
                if m.pid is not None and m.ended is None
            ),
            "done": sum(self._tests.counts.values()),
            "total": total,
            "by_needs": self._by_needs,
        }
        return seen

    def _shrink(self, members: Sequence[WorkerRecord]) -> None:
        """Give back the slots of workers that have ended, but for the last ones: their processes
        hold VRAM until the session ends, which gives everything back."""
        if all(member.ended is not None and not member.crashed for member in members):
            return
        # Tests with needs of their own may take the slots of others, up to the budget.
        is_fixed = self._look is None and not self._by_needs
        if is_fixed and not self._plan.request.in_process:
            left = slots_by_device(self._plan)
            for member in members:
                # xdist puts another one in the place of a worker that crashed.
                if member.ended is not None and not member.crashed and member.device:
                    left[member.device] -= member.slot
            self._lessee.shrink({uuid: max(0, size) for uuid, size in left.items()})
