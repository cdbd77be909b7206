"""The VRAM that a model of Ollama's takes: waited for before it is loaded, and kept meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.phases import too_large
from pytest_gpushare.scheduler.types import Action, Note, OpenModel
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.accounts import DeviceLedger
    from pytest_gpushare.scheduler.gpu_pool import GpuPool
    from pytest_gpushare.scheduler.model_queue import ModelQueue
    from pytest_gpushare.scheduler.pressure import Reclaiming

WORTH_A_NOTE = 0.5
"""Seconds."""

DRAINED = 2.0
"""Seconds after the last GPU test for which VRAM that comes back late is waited for."""


class ModelRoom:
    """Keeps VRAM for one model at a time, and sees to it that it is there."""

    def __init__(self, queue: ModelQueue, gpu: GpuPool, reclaiming: Reclaiming) -> None:
        self._queue, self._gpu, self._reclaiming = queue, gpu, reclaiming
        self.due: int | None = None
        """The group whose model waits for VRAM."""
        self._began = self._since = 0.0
        """Since when it waits, and since when no other session has got on."""
        self._progress: list[int] = []
        self._drained_at: float | None = None
        """When the last GPU test was over that ran where the model is to be loaded."""

    @property
    def is_held(self) -> bool:
        """Whether VRAM is kept for a model."""
        return any(ledger.has_model_reservation for ledger in self._gpu.ledgers.values())

    def devices_of(self, group: int) -> list[tuple[DeviceLedger, int]]:
        """The devices on which the model may be loaded, and the bytes that it takes there."""
        found, ledgers = self._queue.facts(group).reservations.items(), self._gpu.ledgers
        return [(ledgers[uuid], size) for uuid, size in found if uuid in ledgers]

    # --- tests that need VRAM beside their model ---

    def refuses(self, test: int, group: int) -> str:
        """Why a test can never run next to its own model; empty where it can."""
        need = self._gpu.need(test).vram
        devices = self.devices_of(group)
        budgets = [(ledger.full.budget, size) for ledger, size in devices]
        if need is None and self._gpu.jobs[test].marked:
            # Whatever it takes: it has a context.
            need = min((ledger.full.context for ledger, _ in devices), default=0)
        if need is None or not budgets or len(self._gpu.ledgers) > len(budgets):
            return ""
        budget, size = max(budgets)
        return too_large(need, size, self._queue.facts(group).name, budget)

    def limit_unknown(self, test: int, group: int) -> None:
        """A need that nobody knows must leave room for the model, and for other contexts."""
        workers = self._gpu.workers.values()
        for ledger, size in self.devices_of(group):
            others = sum(ledger.full.uuid in worker.devices for worker in workers) - 1
            rest = ledger.full.budget - size - max(0, others) * ledger.full.context
            self._gpu.limit_unknown(test, rest)

    # --- one model ---

    def hold(self, group: int) -> None:
        """Keep what the model takes."""
        for ledger, size in self.devices_of(group):
            ledger.due = size
            # What is resident now may be a model of ours that is being unloaded.
            ledger.reserve_for_model(ledger.full.resident + size)
        self._gpu.note_change()

    def await_room(self, group: int) -> None:
        """VRAM is what the model waits for now."""
        self.hold(group)
        self.due, self._drained_at = group, None
        self._began = self._since = self._gpu.at

    def fit(self, group: int, size: int) -> None:
        """The model is loaded, and takes so many bytes."""
        devices = self.devices_of(group)
        if len(devices) == 1:
            ledger, predicted = devices[0]
            ledger.reserve_for_model(ledger.full.resident + min(size, predicted))

    def release(self, group: int) -> None:
        """Nothing is kept for this model any more."""
        if self.due == group:
            self.due = None
        for ledger, _ in self.devices_of(group):
            ledger.due = 0
            ledger.reserve_for_model(0)
        self._gpu.note_change()

    def look(self) -> Iterator[Action]:
        """What is to be done for the model that waits: it is loaded, given up, or gets room."""
        group = self.due
        if group is None:
            return
        if self._has_room(group):
            self.due = None
            for ledger, _ in self.devices_of(group):
                ledger.due = 0
            waited = self._gpu.at - self._began
            if waited >= WORTH_A_NOTE:
                name = self._queue.facts(group).name
                text = f"{name} waited {waited:.1f} s for VRAM before it was loaded"
                yield Note("ollama-waited", text, {"waited_s": round(waited, 3)})
            yield OpenModel(group)
        elif text := self._lacks_leased(group):
            yield Note("ollama-not-loaded", text)
            self._queue.not_opened(group, "fail", text)
            self.release(group)
        else:
            yield from self._make_room(group)

    def _has_room(self, group: int) -> bool:
        """Whether the model can be loaded now: the server takes the device with most VRAM free."""
        devices = self.devices_of(group)
        for ledger, size in devices:
            free, claimed = ledger.reading.free, ledger.reading.others.claimed
            if free is None and ledger.committed <= ledger.capacity.budget - claimed:
                return True
            if free is not None and free - ledger.outstanding - claimed >= size:
                return True
        if not devices:
            return True
        if any(ledger.running or ledger.reading.others.held_by_others for ledger, _ in devices):
            self._drained_at = None
            return False
        if self._drained_at is None:
            self._drained_at = self._gpu.at
        # Nothing of ours is in the way any more: the server decides, as for any request.
        return self._gpu.at - self._drained_at > DRAINED

    def _lacks_leased(self, group: int) -> str:
        """Why a model is not waited for any more: others have what it takes, and keep it."""
        others = [ledger.reading.others for ledger, _ in self.devices_of(group)]
        progress = [each.progress for each in others]
        if progress != self._progress:
            self._progress, self._since = progress, self._gpu.at
        is_lent = any(each.held_by_others for each in others)
        if not is_lent or self._gpu.at - self._since < self._queue.patience:
            return ""
        facts, who = self._queue.facts(group), "; ".join(o.names for o in others if o.names)
        return (
            f"{facts.name} needs {format_gb(max(facts.reservations.values()))} of VRAM, which "
            f"other sessions have leased: waited {self._gpu.at - self._began:.0f} s: {who}"
        )

    def _make_room(self, group: int) -> Iterator[Action]:
        """Take what idle workers hold."""
        for ledger, _ in self.devices_of(group):
            for name in ledger.accounts:
                worker = self._gpu.workers.get(name)
                if worker is None or not worker.is_between_tests:
                    continue
                if not ledger.running and worker.emptied < 2:
                    yield self._reclaiming.ask(worker, withdraw=worker.emptied == 1)
