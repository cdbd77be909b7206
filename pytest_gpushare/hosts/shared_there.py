"""What the run leases on other hosts while its tests are dispatched: asked for, and respected.

Each host's own process keeps the lease, see `lease_here`: one question at a time, and until it is
answered the tests hold no more than they have.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pytest_gpushare.hosts.answers import Foreign, as_list, as_text, as_whole
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.scheduler.sharing import OwnShare
from pytest_gpushare.scheduler.types import DeviceReading, Others
from pytest_gpushare.units import MOST_VRAM

_MOST_DEVICES = 64
_LONGEST = 2000


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
        self._names = {key: uuid for uuid, key in keys.items()}
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
            elif message.get("number") == self._number:
                # Also where it makes no sense: no test waits for an answer without end.
                self._is_asking = False
                self._leased(Foreign(message))
            self.is_due = True
        self.wake()

    def _leased(self, found: Foreign) -> None:
        progress, rows = found.whole("progress"), found.items("devices", _MOST_DEVICES)
        for uuid, row in rows.items():
            key = self._keys.get(uuid)
            lease, numbers, names = as_list(row, 3)
            if key is None:
                continue
            claimed, lent, keepable, owed, lacks, waiting = as_list(numbers, 6)
            self._limits[key] = as_whole(lease, MOST_VRAM)
            self._others[key] = Others(
                as_whole(claimed, MOST_VRAM),
                as_whole(lent, MOST_VRAM),
                None if keepable is None else as_whole(max(0, keepable), MOST_VRAM),
                as_whole(owed, MOST_VRAM),
                as_whole(lacks, MOST_VRAM),
                bool(waiting),
                progress=progress,
                names=as_text(names, _LONGEST),
            )
        self.is_shared = found.flag("shared")
        problem = found.text("problem")
        if problem and problem != self._problem:
            self._note(f"the leases of other sessions are not known: {problem}")
        self._problem = problem

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
                        lent=max(self._others[key].lent, self._totals.get(key, 0)),
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
