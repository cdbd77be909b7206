"""The accounts of VRAM: what each worker may hold, and what is left on each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_gpushare.plan.work import Reading, Room


@dataclass
class Account:
    """What one worker has on one device, in bytes."""

    held: int = 0
    """What it holds while it is idle, or held when its test began."""
    need: int = 0
    """What its running test was admitted with; 0 while it is idle."""
    now: int | None = None
    """What NVML says that it holds; None: nobody tells."""
    used: bool = False
    """Whether it has run a GPU test there, and so has a context."""
    running: bool = False
    fresh: bool = False
    """Whether its test began after the device was read: it cannot be seen there yet."""

    @property
    def committed(self) -> int:
        """What is set aside for it: a test that takes more than its need is believed."""
        held = self.held if self.now is None else self.now
        return max(self.need, held) if self.running else held

    @property
    def outstanding(self) -> int:
        """What its test may still take."""
        held = self.held if self.now is None else self.now
        return max(0, self.need - held) if self.running else 0


@dataclass
class Ledger:
    """One device: the accounts of its workers, and what was read of it last."""

    room: Room
    accounts: dict[str, Account] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    is_due: bool = False
    """Whether a test is over since then: the same figures mean something else now."""

    def open(self, worker: str) -> None:
        """A worker that sees the device; it has no context yet."""
        self.accounts[worker] = Account()

    def close(self, worker: str) -> int:
        """The worker is gone; returns what was set aside for it, which may come back late."""
        account = self.accounts.pop(worker, None)
        return account.committed if account else 0

    def start(self, worker: str, need: int) -> None:
        """A test was admitted."""
        account = self.accounts[worker]
        account.need, account.running, account.used, account.fresh = need, True, True, True

    def stop(self, worker: str, held: int | None) -> int:
        """The test is over; returns what should come back."""
        account = self.accounts[worker]
        before = account.committed
        account.running, account.need, account.now = False, 0, None
        self.is_due = True
        # What nobody tells: a context is there in any case, caches and fixtures perhaps.
        account.held = max(0, held) if held is not None else self.room.context
        return max(0, before - account.held)

    def emptied(self, worker: str, held: int | None) -> int:
        """The worker gave back what it could; returns what should come back."""
        account = self.accounts[worker]
        before = account.committed
        account.now = None
        self.is_due = True
        account.held = max(0, held) if held is not None else min(account.held, self.room.context)
        return max(0, before - account.held)

    def read(self, reading: Reading) -> bool:
        """Take what NVML says now. Returns whether that is anything new."""
        if not self.is_due and (reading is self.reading or reading == self.reading):
            return False
        self.reading, self.is_due = reading, False
        # 0 bytes for every process is what containers and WSL report for "unknown".
        told = any(reading.held.values())
        for worker, account in self.accounts.items():
            account.fresh = False
            if worker in reading.held:
                account.now = reading.held[worker] if told else None
        return True

    def left(self, worker: str) -> int:
        """Bytes that this worker's whole process may hold by the plan's budget."""
        used = sum(a.committed for name, a in self.accounts.items() if name != worker)
        return self.room.budget - used

    def live(self, worker: str) -> int | None:
        """The same by what is free now; None where that cannot be told."""
        free = self.reading.free
        if free is None:
            return None
        outstanding = sum(a.outstanding for name, a in self.accounts.items() if name != worker)
        outstanding = max(0, outstanding - self._unseen())
        own = self.accounts.get(worker)
        held = 0 if own is None else (own.held if own.now is None else own.now)
        return free - self.kept - outstanding + held

    @property
    def kept(self) -> int:
        """What must stay free: Ollama's outstanding reservation and the safety buffer."""
        resident = self.reading.resident
        resident = self.room.resident if resident is None else resident
        return max(0, self.room.reservation - resident) + self.room.safety_buffer

    def limit(self, worker: str) -> int:
        """The largest need that may start in this worker now: the smaller of `left` and `live`.

        Asked for every test, so both are found in one go.
        """
        used = outstanding = own = 0
        for name, account in self.accounts.items():
            held = account.held if account.now is None else account.now
            if name == worker:
                own = held
            elif account.running and account.need > held:
                used += account.need
                outstanding += account.need - held
            else:
                used += held
        left = self.room.budget - used
        free = self.reading.free
        if free is None:
            return left
        if outstanding:
            outstanding = max(0, outstanding - self._unseen())
        return min(left, free - self.kept - outstanding + own)

    def floor(self, worker: str) -> int:
        """What the worker holds at least as long as it lives, once it has a context."""
        account = self.accounts[worker]
        return min(account.committed, self.room.context) if account.used else 0

    def most(self, worker: str) -> int:
        """The largest need that can ever fit in this worker while the others live."""
        others = sum(self.floor(name) for name in self.accounts if name != worker)
        return self.room.budget - others

    def retained(self, worker: str) -> int:
        """What an idle worker holds beyond its context."""
        account = self.accounts[worker]
        return 0 if account.running else max(0, account.committed - self.room.context)

    @property
    def is_running(self) -> bool:
        """Whether a GPU test runs here."""
        return any(account.running for account in self.accounts.values())

    @property
    def running(self) -> list[str]:
        """The workers that run a GPU test here."""
        return [name for name, account in self.accounts.items() if account.running]

    def _unseen(self) -> int:
        """What running tests have taken of their needs already, where NVML names no process.

        On WDDM, in WSL and in most containers it does not. There what the device lost since
        the plan was made is taken to be theirs, as far as their needs go: else each byte that
        a test allocates would count twice, and one worker's test would keep the others waiting.
        """
        unknown = [a for a in self.accounts.values() if a.running and a.now is None and not a.fresh]
        if not unknown or self.room.free is None or self.reading.free is None:
            return 0
        resident = self.reading.resident
        grown = 0 if resident is None else max(0, resident - self.room.resident)
        taken = self.room.free - self.reading.free - grown
        seen = sum(
            account.held if account.now is None else account.now
            for account in self.accounts.values()
        )
        return max(0, min(taken - seen, sum(a.outstanding for a in unknown)))


def held_on(held: Mapping[str, int] | None, device: str) -> int | None:
    """What a report says of one device; None where it does not speak of it."""
    return None if held is None else held.get(device)
