"""The accounts of VRAM: what each worker may hold, and what is left on each device."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gpushare.scheduler.types import DeviceCapacity, DeviceReading


@dataclass(eq=False, slots=True)
class Account:
    """What one worker has on one device, in bytes."""

    held: int = 0
    """What it holds while it is idle, or held when its test began."""
    need: int = 0
    """What its running test was admitted with; 0 while it is idle."""
    by_nvml: int | None = None
    """What NVML says that it holds; None: unknown."""
    has_context: bool = False
    """Whether it has run a GPU test there, and so has a context."""
    running: bool = False
    began_after_reading: bool = False
    """Whether its test began after the device was read: it cannot be seen there yet."""
    left_behind: int = 0
    """What processes hold that a test of this worker started and that have outlived it."""
    present: int = 0
    """What it holds as far as is known."""
    committed: int = 0
    """What is set aside for it: the need of its test, or what it holds where that is more."""
    outstanding: int = 0
    """What its test may still take."""
    ahead: int = 0
    """What its next test, which was sent already, takes of the VRAM that is free while the running
    one ends: what that gives back may come late."""
    beyond: int = 0
    """The part of that which is not in `outstanding`."""
    unseen: int = 0
    """What it keeps for its next test beyond `present`, where neither NVML nor the worker itself
    knows: what the device lacked when its last test was over, as far as that was admitted with so
    much."""


class DeviceLedger:
    """One device: the accounts of its workers, and what was read of it last.

    What is asked for every test is a sum over all accounts; so the sums are kept, and change
    with each account, which happens less often.
    """

    def __init__(self, capacity: DeviceCapacity) -> None:
        self.full = capacity
        """As the plan leaves it to the tests."""
        self.capacity = capacity
        """The same, less what is kept for a model that tests use."""
        self.awaited_by_model = 0
        """What a model takes that is to be loaded, while it waits for that."""
        self.accounts: dict[str, Account] = {}
        self.running: dict[str, Account] = {}
        """The workers that run a GPU test here."""
        self.reading = DeviceReading()
        self.has_report = False
        """Whether a test is over since then: the same figures mean something else now."""
        self.kept = 0
        """What must stay free: the servers' outstanding reservations, the safety buffer, and what
        other sessions claim."""
        self.budget = capacity.budget
        """That of the device, or what of it may be used while the other sessions are not known."""
        self.has_left_behind = False
        """Whether processes have outlived the tests that started them."""
        self._is_attributed = False
        """Whether NVML has reported what a worker holds here."""
        self.present = self.committed = self.outstanding = self.beyond = 0
        """The sums over all accounts."""
        self._recount()

    def open(self, worker: str) -> None:
        """A worker that sees the device; it has no context yet."""
        self.accounts[worker] = Account()

    def close(self, worker: str) -> int:
        """The worker is gone; returns what was set aside for it, which may come back late."""
        account = self.accounts[worker]
        before = account.committed
        account.held = account.need = account.ahead = 0
        account.by_nvml, account.running = None, False
        self._post(account)
        self.running.pop(worker, None)
        del self.accounts[worker]
        return before

    def start(self, worker: str, need: int) -> None:
        """A test was admitted."""
        self.running[worker] = account = self.accounts[worker]
        account.need = need
        account.running = account.has_context = account.began_after_reading = True
        self._post(account)

    def keep_ahead(self, worker: str, need: int) -> None:
        """Keep so much free for the next test of a worker while its running one ends; 0: none."""
        account = self.accounts[worker]
        account.ahead = need
        self._post(account)

    def stop(self, worker: str, held: int | None) -> int:
        """The test is over; returns what should come back."""
        # Where `held` is unknown the context alone counts, though caches and fixtures may be there.
        account = self.running.pop(worker, None) or self.accounts[worker]
        # The next reading shows how much of it.
        account.unseen = account.need if held is None else 0
        account.running, account.need = False, 0
        return self._report(account, self.capacity.context if held is None else held)

    def emptied(self, worker: str, held: int | None) -> int:
        """The worker gave back what it could; returns what should come back."""
        account = self.accounts[worker]
        if held is not None:
            account.unseen = 0
        return self._report(
            account, min(account.held, self.capacity.context) if held is None else held
        )

    def _report(self, account: Account, held: int) -> int:
        """Use the worker's own figure until the next reading of the device."""
        before = account.committed
        account.held, account.by_nvml = held if held > 0 else 0, None
        self.has_report = True
        self._post(account)
        return before - account.held if before > account.held else 0

    def _post(self, account: Account) -> None:
        """Bring the sums up to date with an account that changed."""
        present = account.held if account.by_nvml is None else account.by_nvml
        committed, outstanding = present, 0
        if account.running and account.need > present:
            committed, outstanding = account.need, account.need - present
        beyond = account.ahead
        if beyond and account.by_nvml is not None:
            # The running test, of which the call is over, has given back what it held and takes
            # no more: what is outstanding is the next one's. Where that is unknown both count.
            beyond = max(0, beyond - outstanding)
        self.present += present - account.present
        self.committed += committed - account.committed
        self.outstanding += outstanding - account.outstanding
        self.beyond += beyond - account.beyond
        account.present, account.committed = present, committed
        account.outstanding, account.beyond = outstanding, beyond

    def read(self, reading: DeviceReading) -> bool:
        """Take what NVML says now. Returns whether that is anything new."""
        if not self.has_report and (reading is self.reading or reading == self.reading):
            return False
        if reading is not self.reading:
            self.reading = reading
            self._recount()
        self.has_report = False
        for account in self.running.values():
            account.began_after_reading = False
        if reading.left_behind or self.has_left_behind:
            self._note_left_behind(reading)
        if reading.held:
            # 0 bytes for every process, always, is what containers and WSL report for "unknown".
            self._is_attributed = attributed = self._is_attributed or any(reading.held.values())
            for worker, account in self.accounts.items():
                if worker in reading.held:
                    account.by_nvml = reading.held[worker] if attributed else None
                    self._post(account)
        self._note_unseen()
        return True

    def reserve_for_model(self, size: int) -> None:
        """Keep so many bytes for Ollama's models, or what the plan keeps, where that is more."""
        full = self.full
        more = max(0, size - max(full.reservation, full.resident))
        self.capacity = full._replace(
            reservation=max(full.reservation, size), budget=max(0, full.budget - more)
        )
        self._recount()
        self.has_report = True

    def _recount(self) -> None:
        capacity, reading, others = self.capacity, self.reading, self.reading.others
        resident = capacity.resident if reading.resident is None else reading.resident
        outstanding = max(0, capacity.reservation - resident) + reading.outstanding
        self.kept = outstanding + capacity.safety_buffer + others.claimed
        limit, budget = others.limit, capacity.budget
        self.budget = budget if limit is None else min(limit, budget)

    @property
    def has_model_reservation(self) -> bool:
        """Whether VRAM is kept for a model that tests use."""
        return self.capacity.budget < self.full.budget

    def _note_unseen(self) -> None:
        for account in self.accounts.values():
            if not account.unseen:
                continue
            if account.by_nvml is not None or self._is_attributed or self.reading.is_attributed:
                account.unseen = 0
            else:
                lacking = self._lacking() - self._unseen_beside(account)
                for other in self.running.values():
                    if other is not account and other.by_nvml is None:
                        lacking -= other.outstanding
                account.unseen = max(0, min(account.unseen, lacking))

    def _lacking(self) -> int:
        """Bytes that the device has lost since the plan was made and that no account explains."""
        capacity, reading = self.capacity, self.reading
        if capacity.free is None or reading.free is None:
            return 0
        resident = reading.resident
        grown = 0 if resident is None else max(0, resident - capacity.resident)
        return capacity.free - reading.free - grown - self.present

    def _unseen_beside(self, account: Account | None) -> int:
        """What idle workers keep unseen, without this one."""
        return sum(
            other.unseen
            for other in self.accounts.values()
            if other is not account and not other.running
        )

    def _note_left_behind(self, reading: DeviceReading) -> None:
        for worker, account in self.accounts.items():
            if reading.held.get(worker) is None:
                continue
            size = reading.left_behind.get(worker, 0)
            # While a test runs, it may have started them itself.
            account.left_behind = min(account.left_behind, size) if account.running else size
        self.has_left_behind = any(account.left_behind for account in self.accounts.values())

    def limit_by_budget(self, worker: str) -> int:
        """Bytes that this worker's whole process may hold by the plan's budget."""
        return self.budget - self.committed + self.accounts[worker].committed

    def limit_by_free_vram(self, worker: str) -> int | None:
        """The same by what is free now, or leased on its host; None where neither is known."""
        own, reading = self.accounts[worker], self.reading
        if self.bars(own):
            return 0
        leased = reading.others.leased
        if leased is not None:
            leased += own.committed - self.committed
        if reading.free is None:
            return leased
        outstanding = self._unclaimed(self.outstanding - own.outstanding)
        live = reading.free - self.kept - outstanding + own.present + own.unseen
        live -= self.beyond - own.beyond
        return live if leased is None or live < leased else leased

    def fits_alone(self, need: int) -> bool:
        """Whether so much fits here once all our tests are over; what others hold stays."""
        if self.reading.free is None:
            return True
        # What is set aside beyond what tests will still take is there already, and comes back.
        ours = self.committed - self.outstanding
        return self.reading.free - self.kept + ours >= need

    def bars(self, account: Account) -> bool:
        """Whether older sessions need the VRAM that this worker would keep between its tests."""
        keepable = self.reading.others.keepable
        return keepable is not None and not account.has_context and self.capacity.context > keepable

    def limit(self, worker: str) -> int:
        """The largest need that may start in this worker now: the smaller of `limit_by_budget` and
        `limit_by_free_vram`."""
        own, free = self.accounts[worker], self.reading.free
        if self.bars(own):
            return 0
        left, live = self.limit_by_budget(worker), self.limit_by_free_vram(worker)
        if live is not None and live < left:
            left = live
        if free is None:
            return left - self.reading.others.claimed
        if own.left_behind:
            # A need that is no more than a slot may count them in; but what they hold is not free.
            left = min(left, free + own.present + own.unseen - own.left_behind)
        return left

    def floor(self, worker: str) -> int:
        """What the worker holds at least as long as it lives, once it has a context."""
        account = self.accounts[worker]
        return min(account.committed, self.capacity.context) if account.has_context else 0

    def most(self, worker: str) -> int:
        """The largest need that can ever fit in this worker while the others live."""
        others = sum(self.floor(name) for name in self.accounts if name != worker)
        return self.capacity.budget - others

    def retained(self, least: int) -> list[tuple[int, str]]:
        """The idle workers that hold so much beyond their contexts, and how much that is."""
        context = self.capacity.context
        return [
            (account.committed - context, worker)
            for worker, account in self.accounts.items()
            if account.committed - context >= least and not account.running
        ]

    def runs_beside(self, worker: str) -> bool:
        """Whether another worker than this one runs a GPU test here."""
        return len(self.running) > (worker in self.running)

    def _unclaimed(self, outstanding: int) -> int:
        """What running tests may still take, less what they have taken already, unseen.

        NVML names no process on WDDM, in WSL and in most containers. There what the device lost
        since the plan was made is taken to be theirs, as far as their needs go: else each byte
        that a test allocates would count twice, and one worker's test would keep the others
        waiting.
        """
        if not outstanding:
            return outstanding
        unknown = 0
        for account in self.running.values():
            if account.by_nvml is None and not account.began_after_reading:
                unknown += account.outstanding
        if not unknown:
            return outstanding
        taken = self._lacking() - self._unseen_beside(None)
        return max(0, outstanding - max(0, min(taken, unknown)))
