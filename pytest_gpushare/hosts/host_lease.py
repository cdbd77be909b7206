"""What a run leases on another host while its tests are dispatched: by the test, beside others.

`LeaseHere` is the end on that host, in the plugin's process there: it never holds the gate of the
ledger while a message travels. `HostLease` is the end in the controller, which asks one question
at a time; until it is answered the tests hold no more than they have. Before they may hold more,
that is leased, and before less is leased, the controller has agreed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pytest_gpushare.hosts.answers import Leased, LeasedDevice, message, read
from pytest_gpushare.leases.claims import NOTHING, Naming
from pytest_gpushare.leases.ledger import LedgerError
from pytest_gpushare.leases.lessee import Lessee, Revision, View, progress_of
from pytest_gpushare.leases.records import DeviceLease, SessionWorker
from pytest_gpushare.planning.leasing import capacities_of
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.scheduler.sharing import (
    OwnShare,
    are_shared,
    is_asked,
    lease_on,
    others_on,
)
from pytest_gpushare.scheduler.types import DeviceReading, Others
from pytest_gpushare.text import one_line

Send = Callable[[dict[str, Any]], None]

_LOOK = 0.05
"""Seconds between two looks at the other sessions."""

_GIVING_UP = 1.0
"""Seconds between two messages that another session needs what idle workers keep."""

_BEFORE_ALL = -1
"""The ticket of a session for its first tests: it has waited for its turn when it started."""


class Asked(NamedTuple):
    """What the controller said last."""

    number: int
    shares: Mapping[str, OwnShare]
    """UUID -> what it has there and wants."""
    kept: Mapping[str, int]
    """UUID -> bytes that its tests may hold until it is informed of others."""


class LeaseHere:
    """The record of the run on this host."""

    def __init__(self, lessee: Lessee, plan: Plan, shows_everybody: bool, send: Send) -> None:
        self._lessee, self._plan, self._send = lessee, plan, send
        self._naming = Naming(shows_everybody)
        self._workers: dict[int, SessionWorker] = {}
        """Number in the plan -> the worker that has this place now."""
        self._capacities = {d.uuid: d for d in capacities_of(plan)} if lessee.claims_devices else {}
        self._asked: Asked | None = None
        self._granted: dict[str, int] = {}
        """UUID -> what was leased since then: the controller may have used it by now."""
        self._informed: Leased | None = None
        """The last answer."""
        self._is_shared = True
        self._waits = self._has_begun = False
        self._asked_at = float("-inf")
        self._progress: tuple[object, int] = (None, 0)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="gpu-share-lease", daemon=True)

    def joined(self, line: str) -> None:
        """`0 gw3 1234`: number in the plan, name and PID of a worker that is here now."""
        number, name, pid = line.split()
        slots = self._plan.slots
        slot = slots[int(number)] if int(number) < len(slots) else None
        role, device = ("cpu", None) if slot is None else ("gpu", slot.device.uuid)
        size = 0 if slot is None else slot.vram
        self._workers[int(number)] = SessionWorker(name, int(pid), role, device, size)
        # What its processes hold is not counted beside the lease.
        self._lessee.change(workers=tuple(self._workers.values()))

    def share(self, line: str) -> None:
        """The controller's shares of the devices: lease accordingly, and answer."""
        said = json.loads(line)
        devices = said["devices"]
        asked = Asked(
            said["number"],
            {uuid: OwnShare(*share) for uuid, (share, _) in devices.items()},
            {uuid: kept for uuid, (_, kept) in devices.items()},
        )
        with self._lock:
            self._asked = asked
            self._informed, self._granted = None, {}
            self._decide()

    def start(self) -> None:
        """Look for other sessions from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look for others no more."""
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.wait(_LOOK):
            # Whatever fails here is tried again; without a controller the process ends.
            with contextlib.suppress(Exception):
                self.look()

    def look(self) -> None:
        """Is there now what the tests wait for? Else: does another session come, or wait?"""
        if self._waits:
            with self._lock:
                self._decide()
            return
        if self._asked is None:
            return
        claims, now = self._lessee.look().claims, time.monotonic()
        is_new = not self._is_shared and are_shared(claims, self._capacities)
        is_due = now - self._asked_at >= _GIVING_UP
        if is_new or (is_due and is_asked(claims, self._lessee.record)):
            self._is_shared, self._asked_at = True, now
            self._send(message("others", None))

    def _decide(self) -> None:
        """Lease what is there of what is wanted, and inform the controller of anything new."""
        asked = self._asked
        if asked is None:
            return
        others: dict[str, Others] = {}
        problem = ""
        try:
            self._lessee.revise(lambda view: self._revised(view, asked, others))
        except LedgerError as error:
            # Nobody knows what others do: the tests keep to what is leased.
            problem, self._is_shared, self._waits = str(error), True, True
        answer = Leased(
            asked.number,
            self._is_shared,
            problem,
            {
                uuid: LeasedDevice(
                    self._lessee.record.lease(uuid).lease,
                    others.get(uuid, Others())._replace(progress=self._progress[1]),
                )
                for uuid in self._capacities
            },
        )
        if answer != self._informed:
            self._informed = answer
            self._send(message("leased", answer))

    def _revised(self, view: View, asked: Asked, others: dict[str, Others]) -> Revision:
        self._is_shared = are_shared(view.claims, self._capacities)
        progress = progress_of(view.sessions)
        if progress != self._progress[0]:
            self._progress = progress, self._progress[1] + 1
        ticket = view.ticket if self._has_begun else _BEFORE_ALL
        self._has_begun = True
        devices: dict[str, DeviceLease] = {}
        waits: set[tuple[str, int]] = set()
        for uuid, own in asked.shares.items():
            device = self._capacities.get(uuid)
            if device is None:
                continue
            claims = view.claims.get(uuid, NOTHING)
            memory = view.memory.get(uuid)
            reading = DeviceReading(None if memory is None else memory.free)
            seniority = self._lessee.seniority
            found = others_on(device, reading, claims, own, seniority, ticket)
            left = device.budget - own.committed
            if reading.free is not None:
                left = min(left, reading.free - own.reserved - own.outstanding)
            wanted, before = own.committed + own.want, self._granted.get(uuid, 0)
            is_there = before >= wanted or own.want <= left - found.claimed
            published = lease_on(device, own, is_shared=self._is_shared)
            lease = max(published.lease, asked.kept[uuid], before, wanted if is_there else 0)
            self._granted[uuid] = lease
            waiting = own.want if self._is_shared and not is_there else 0
            devices[uuid] = published._replace(
                lease=lease, want=waiting, spare=max(0, lease - own.kept)
            )
            if waiting and own.waits_for is not None:
                waits.add((uuid, own.waits_for))
            names = self._naming.holders(claims, time.time())
            keepable = None if found.keepable is None else max(0, found.keepable)
            others[uuid] = found._replace(keepable=keepable, names=one_line(names, 1000))
        self._waits = bool(waits)
        return Revision(devices, frozenset(waits))


class HostLease:
    """The lease on one host, as it is known here. Any thread may use it."""

    def __init__(
        self,
        keys: Mapping[str, str],
        plan: Plan,
        say: Callable[[str], object],
        note: Callable[[str], object],
    ) -> None:
        """`keys`: UUID there -> the device's name in the run; `plan`: that of the host.

        `say` sends the host a line, `note` gets a sentence where its ledger cannot be used.
        """
        self._keys, self._say, self._note = keys, say, note
        self.wake: Callable[[], object] = lambda: None
        self._names = {keys[d.device.uuid]: d.device.uuid for d in plan.devices}
        self._totals = {keys[d.device.uuid]: d.device.total for d in plan.devices}
        self._limits = dict.fromkeys(self._names, 0)
        for slot in plan.slots:
            self._limits[keys[slot.device.uuid]] += slot.vram
        self._others = dict.fromkeys(self._names, Others())
        self._number = 0
        self._said: Mapping[str, OwnShare] = {}
        self._is_asking = False
        self.is_shared = True
        """Whether another session may name one of the devices there, as far as is known."""
        self.is_due = True
        """Whether something has come from the host since the last step."""
        self._problem = ""
        self._lock = threading.Lock()

    def take(self, message: Mapping[str, Any]) -> None:
        """What the host says. Raises `ValueError` for what makes no sense."""
        with self._lock:
            if message.get("kind") == "others":
                self.is_shared = True
                self._said = {}
            else:
                try:
                    self._leased(read(Leased, message))
                except ValueError:
                    # No test waits for an answer without end.
                    self._is_asking = False
                    raise
            self.is_due = True
        self.wake()

    def _leased(self, found: Leased) -> None:
        if found.number != self._number:
            return
        self._is_asking, self.is_shared = False, found.is_shared
        for uuid, device in found.devices.items():
            if uuid in self._keys:
                self._limits[self._keys[uuid]] = device.lease
                self._others[self._keys[uuid]] = device.others
        if found.problem and found.problem != self._problem:
            self._note(f"the leases of other sessions are not known: {found.problem}")
        self._problem = found.problem

    def limited(self, readings: Mapping[str, DeviceReading]) -> dict[str, DeviceReading]:
        """The readings of its devices, with what others claim and what is leased there."""
        with self._lock:
            if not self.is_shared:
                return {}
            return {
                key: readings.get(key, DeviceReading())._replace(
                    others=self._others[key]._replace(
                        leased=self._limits[key],
                        # Whatever is not leased may be, once others have given it back.
                        held_by_others=max(
                            self._others[key].held_by_others, self._totals.get(key, 0)
                        ),
                        is_asked=self._is_asking,
                    )
                )
                for key in self._names
            }

    def publish(self, shares: Mapping[str, OwnShare]) -> None:
        """Ask the host for what the tests want now, and give back what they do without."""
        with self._lock:
            own = {key: shares[key] for key in self._names if key in shares}
            if not self.is_shared or self._is_asking or own == self._said:
                return
            is_first, self._said = not self._number, own
            self._number += 1
            self._is_asking = True
            devices = {}
            for key, share in own.items():
                if not is_first and self._limits[key] > share.committed:
                    # What is leased beyond it is given back with these words.
                    self._limits[key], self.is_due = max(0, share.committed), True
                devices[self._names[key]] = [list(share), self._limits[key]]
            text = json.dumps({"number": self._number, "devices": devices})
        self._say(f"share {text}")


class LeasesElsewhere:
    """The leases on all other hosts, for the executor."""

    def __init__(self, leases: list[HostLease], wake: Callable[[], object]) -> None:
        """`wake` has a step done."""
        self._leases = leases
        for lease in leases:
            lease.wake = wake

    @property
    def is_due(self) -> bool:
        """Whether a host has said something since the last step."""
        return any(lease.is_due for lease in self._leases)

    @property
    def is_shared(self) -> bool:
        """Whether other sessions may name a device on one of the hosts."""
        return any(lease.is_shared for lease in self._leases)

    def limited(self, readings: Mapping[str, DeviceReading]) -> Mapping[str, DeviceReading]:
        """The readings, with what others claim there."""
        found = dict(readings)
        for lease in self._leases:
            lease.is_due = False
            found.update(lease.limited(readings))
        return found

    def publish(self, shares: Mapping[str, OwnShare]) -> None:
        """Inform each host of what the run has there and wants."""
        for lease in self._leases:
            lease.publish(shares)
