"""Exclusive use of a device by one test: one that ran out of memory beside others runs again.

A worker reports that its test ran out of memory (`oom`). Other workers of this run on the device
are paused between two tests (`pause`, answered by `quiet`), and the worker gets the device to
itself (`alone`) until the end of that test (`alone-over`). No test is interrupted or dispatched
again, and a worker that dies meanwhile is not waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_gpushare.gpu.attribution import Holding

if TYPE_CHECKING:
    from pytest_gpushare.events import Record
    from pytest_gpushare.planning.plan import Plan
    from pytest_gpushare.wire import Links


LATE = 30.0
"""Seconds for which the VRAM of workers that are gone is waited for."""
BRIEF = 2.0
"""The same for a worker that ended in order. Its process is being ended by now, or it stays and
keeps its VRAM until the session is over."""


@dataclass(eq=False, repr=False)
class _Request:
    """A worker that wants its devices alone, or has them."""

    worker: str
    devices: frozenset[str]
    late: bool = False
    """Whether VRAM of workers that are gone has yet to come back."""
    granted: bool = False


class ExclusiveAccess:
    """Decides which worker has which devices to itself, and which workers rest meanwhile."""

    def __init__(
        self,
        plan: Plan,
        holding: Callable[[str, str, Mapping[int, str]], Holding] | None,
        links: Links,
        record: Record,
        *,
        patience: float,
        leased: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        """`patience`: seconds for which the other workers may finish their tests. `leased`: UUID
        -> the bytes that the session has leased for all its tests; None where it leases by the
        test."""
        self._plan, self._holding, self._links, self._record = plan, holding, links, record
        self._patience, self._leased = patience, leased
        self._lock = threading.RLock()
        self._devices: dict[str, frozenset[str]] = {}
        self._pids: dict[str, int] = {}
        """Also of workers that are gone: their VRAM comes back late at times."""
        self._ended: dict[str, float] = {}
        """Worker that ended in order -> when, on the monotonic clock."""
        self._queue: list[_Request] = []
        self._resting: dict[str, tuple[int, bool]] = {}
        """Worker -> (number of the request to rest, whether it has said that it does)."""
        self._number = 0
        links.on("here", self._note_pid)
        links.on("oom", self._ran_out)
        links.on("quiet", self._note_rest)
        links.on("alone-over", self._note_end)

    def joined(self, worker: str, devices: Iterable[str]) -> None:
        """A worker with these devices is starting."""
        with self._lock:
            self._devices[worker] = frozenset(devices)
            self._advance()

    def gone(self, worker: str, *, in_order: bool = False) -> None:
        """A worker has ended or died, perhaps while it was waiting or resting."""
        with self._lock:
            if in_order:
                self._ended[worker] = time.monotonic()
            self._devices.pop(worker, None)
            self._resting.pop(worker, None)
            self._queue = [request for request in self._queue if request.worker != worker]
            self._advance()

    def busy(self, device: str) -> bool:
        """Whether a test has this device alone now, or waits for it."""
        with self._lock:
            return any(device in request.devices for request in self._queue)

    def _note_pid(self, worker: str, pid: int) -> None:
        self._pids[worker] = int(pid)

    def _ran_out(self, worker: str, message: Mapping[str, Any]) -> None:
        """Note who holds what at this moment, and say whether the test may run alone."""
        nodeid = str(message["nodeid"])
        own = self._devices.get(worker) or self._devices_in_process()
        labels = {d.device.uuid: d.device.label for d in self._plan.devices}
        found = [self._holding_of(uuid, labels.get(uuid, uuid)) for uuid in sorted(own)]
        text = "; ".join(each.text(worker) for each in found)
        with self._lock:
            late = self._returns_late(found)
            # A worker that has died since it sent this must not hold up the others.
            others = worker in self._devices and (late or self._neighbours(worker, own))
            shared = bool(others and message.get("again", True))
            answer = {
                "verdict": "wait" if shared else "no",
                "text": text,
                # Its neighbours finish their tests first.
                "patience": self._patience,
            }
            self._links.send(worker, "alone", answer)
            if shared:
                self._queue.append(_Request(worker, own, late))
                self._advance()
        free = [each.memory.free for each in found if each.memory is not None]
        self._record.note(
            "oom",
            f"{nodeid} {'ran out of VRAM next to others' if shared else 'ran out of VRAM'}: {text}",
            nodeid=nodeid,
            worker=worker,
            said=str(message.get("said", "")),
            peak=message.get("peak"),
            free=min(free, default=None),
            held=dict(found[0].by) if found else {},
            shared=bool(shared),
        )

    def _note_rest(self, worker: str, message: Mapping[str, Any]) -> None:
        with self._lock:
            number, _ = self._resting.get(worker, (None, False))
            if number is not None and number == message.get("number"):
                self._resting[worker] = (number, True)
                self._advance()

    def _note_end(self, worker: str, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._queue = [request for request in self._queue if request.worker != worker]
            self._advance()
        if message.get("ran"):
            nodeid, outcome = str(message["nodeid"]), str(message["outcome"])
            self._record.note(
                "oom-retried", f"{nodeid} {outcome} alone", nodeid=nodeid, outcome=outcome
            )

    def _devices_in_process(self) -> frozenset[str]:
        """The devices of a run without workers."""
        return frozenset(slot.device.uuid for slot in self._plan.slots[:1])

    def _neighbours(self, worker: str, devices: frozenset[str]) -> list[str]:
        return [other for other, own in self._devices.items() if other != worker and own & devices]

    def _advance(self) -> None:
        """Send whatever requests and answers are due now; with the lock held."""
        taken: set[str] = set()
        wanted: set[str] = set()
        waiting = {request.worker for request in self._queue if not request.granted}
        for request in self._queue:
            if not request.devices & taken:
                neighbours = self._neighbours(request.worker, request.devices)
                wanted.update(name for name in neighbours if name not in waiting)
                if not request.granted and all(self._rests(name, waiting) for name in neighbours):
                    request.granted = True
                    self._grant(request)
            taken |= request.devices
        for worker in sorted(wanted - self._resting.keys()):
            self._number += 1
            self._resting[worker] = (self._number, False)
            self._links.send(worker, "pause", self._number)
        for worker in self._resting.keys() - wanted:
            number, _ = self._resting.pop(worker)
            self._links.send(worker, "resume", number)

    def _rests(self, worker: str, waiting: set[str]) -> bool:
        return worker in waiting or self._resting.get(worker, (0, False))[1]

    def _grant(self, request: _Request) -> None:
        if request.late:
            # Waited for elsewhere: this may be the thread that receives from the other workers.
            wait = partial(self._grant_later, request)
            threading.Thread(target=wait, name="gpu-share-late-vram", daemon=True).start()
        else:
            self._links.send(request.worker, "alone", self._permission(request))

    def _permission(self, request: _Request) -> dict[str, Any]:
        budgets = []
        for planned in self._plan.devices:
            if planned.device.uuid in request.devices:
                leased = self._leased(planned.device.uuid)
                budgets.append(planned.budget if leased is None else min(planned.budget, leased))
        return {"verdict": "go", "budget": min(budgets, default=0)}

    def _grant_later(self, request: _Request) -> None:
        """Grant once the VRAM of workers that are gone has come back, or after `LATE` seconds."""
        end = time.monotonic() + LATE
        while time.monotonic() < end and self._is_held_by_the_gone(request.devices):
            time.sleep(0.1)
        with self._lock:
            if request in self._queue:
                self._links.send(request.worker, "alone", self._permission(request))

    def _is_held_by_the_gone(self, devices: frozenset[str]) -> bool:
        return self._returns_late([self._holding_of(uuid, uuid) for uuid in devices])

    def _holding_of(self, uuid: str, label: str) -> Holding:
        """Who holds the VRAM of a device now."""
        if self._holding is None:
            return Holding(label, None)
        return self._holding(uuid, label, {pid: worker for worker, pid in self._pids.items()})

    def _returns_late(self, found: Iterable[Holding]) -> bool:
        """Whether workers that are gone still hold VRAM that may be about to come back."""
        latest = time.monotonic() - BRIEF
        with self._lock:
            gone = self._pids.keys() - self._devices.keys()
            gone -= {worker for worker, at in self._ended.items() if at < latest}
        return any(gone & each.by.keys() for each in found)
