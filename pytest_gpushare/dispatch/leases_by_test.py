"""Leases by the test: before a test starts, its VRAM is leased; when it is over, given back.

While no other session names a device, this one leases its whole budget there, and no test costs
anything. Beside others each step of the dispatcher is taken with the gate of the ledger held:
what the others claim is part of the readings by which it decides, and what it decided is
published before anybody else can look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.leases.claims import NOTHING, Naming
from pytest_gpushare.leases.ledger import LedgerError
from pytest_gpushare.leases.lessee import Lessee, Revision, View, progress_of
from pytest_gpushare.scheduler.sharing import (
    OwnShare,
    are_shared,
    is_asked,
    lease_on,
    others_on,
)
from pytest_gpushare.scheduler.types import NOBODY, Action, DeviceCapacity, DeviceReading, Others

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.dispatcher import Dispatcher

_PAUSE, _LONGEST_PAUSE = 0.025, 0.25
"""Seconds between two looks at the others while tests wait: longer while nothing happens."""

_MOST_PAUSE = 1.0
"""The same where many wait that asked before."""

_GIVING_UP = 1.0
"""Seconds between two looks whether another session needs what idle workers keep."""


_BEFORE_ALL = -1
"""The ticket of a session that waited for its turn when it started: for its first tests it has
what it has leased."""


class SharedDevices:
    """This session's part in the ledger while the plugin's own dispatch lasts."""

    def __init__(
        self,
        lessee: Lessee,
        capacities: Sequence[DeviceCapacity],
        naming: Naming,
        problem: Callable[[str], object],
        wake: Callable[[], object],
    ) -> None:
        """`problem` gets a sentence where the ledger cannot be used, `wake` has a step done."""
        self._lessee, self._naming, self._problem, self._wake = lessee, naming, problem, wake
        self._capacities = {device.uuid: device for device in capacities}
        self.is_shared = True
        """Whether another session may name one of the devices, as far as is known."""
        self.is_due = True
        """Whether the others are to be looked at in the next step, whatever it is for."""
        self._has_begun = False
        self._woke_at = float("-inf")
        self._had_problem = False
        self._progress: object = None
        self._progressed = 0
        self._pause = _PAUSE
        self.due_at = float("-inf")
        """Before this time no other session needs to be looked at, if nothing happens here."""

    def look(self) -> None:
        """Look at the other sessions without the gate, in a thread of its own, now and then."""
        claims, now = self._lessee.look().claims, time.monotonic()
        is_new = not self.is_shared and are_shared(claims, self._capacities)
        is_due = now - self._woke_at >= _GIVING_UP
        if is_new or (is_due and is_asked(claims, self._lessee.record)):
            self._woke_at = now
            self.is_shared = self.is_due = True
            self._wake()

    def step(
        self, dispatcher: Dispatcher, read: Callable[[], Mapping[str, DeviceReading]]
    ) -> list[Action]:
        """One step of the dispatcher, beside the other sessions."""
        self.is_due = False
        dispatcher.prepare(time.monotonic())
        actions: list[Action] | None = None

        def decide(view: View) -> Revision:
            nonlocal actions
            found = read()
            own = dispatcher.shares()
            progress, readings = self._progress_of(view), dict(found)
            for uuid, device in self._capacities.items():
                reading, claims = found.get(uuid, DeviceReading()), view.claims.get(uuid, NOTHING)
                seniority = self._lessee.seniority
                ticket = view.ticket if self._has_begun else _BEFORE_ALL
                others = others_on(device, reading, claims, own[uuid], seniority, ticket)
                if not self._has_begun:
                    others = others._replace(limit=self._lessee.record.lease(uuid).lease)
                others = others._replace(
                    progress=progress, names=self._naming.holders(claims, time.time())
                )
                shares = are_shared({uuid: claims}, self._capacities)
                readings[uuid] = reading._replace(others=others if shares else NOBODY)
            actions = dispatcher.step(readings, time.monotonic())
            self._has_begun = True
            return self._revision(view, dispatcher.shares(), has_acted=bool(actions))

        try:
            self._lessee.revise(decide)
            self._had_problem = False
        except LedgerError as error:
            self._note(error)
            if actions is None:
                actions = dispatcher.step(self._kept_to(read()), time.monotonic())
        assert actions is not None
        return actions

    def _progress_of(self, view: View) -> int:
        progress = progress_of(view.sessions)
        if progress != self._progress:
            self._progress = progress
            self._progressed += 1
        return self._progressed

    def _revision(self, view: View, own: Mapping[str, OwnShare], *, has_acted: bool) -> Revision:
        self.is_shared = are_shared(view.claims, self._capacities)
        devices = {
            uuid: lease_on(device, own[uuid], is_shared=self.is_shared)
            for uuid, device in self._capacities.items()
        }
        waits = frozenset(
            (uuid, share.waits_for)
            for uuid, share in own.items()
            if share.waits_for is not None and self.is_shared
        )
        self._pause = _PAUSE if has_acted else min(1.5 * self._pause, _LONGEST_PAUSE)
        before = {
            w.ticket for c in view.claims.values() for w in c.waiting if w.ticket < view.ticket
        }
        pause = min(self._pause * (1 + len(before) / 4), _MOST_PAUSE)
        self.due_at = time.monotonic() + pause if waits else float("-inf")
        return Revision(devices, waits)

    def _kept_to(self, readings: Mapping[str, DeviceReading]) -> Mapping[str, DeviceReading]:
        """The readings, with no more to be used than is leased: nobody knows what others do."""
        devices, kept = self._lessee.record.devices, dict(readings)
        for uuid in self._capacities:
            others = Others(limit=devices[uuid].lease) if uuid in devices else NOBODY
            kept[uuid] = readings.get(uuid, DeviceReading())._replace(others=others)
        return kept

    def _note(self, error: LedgerError) -> None:
        if not self._had_problem:
            self._had_problem = True
            self._problem(f"the leases of other sessions are not known: {error}")
