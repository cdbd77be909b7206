"""The VRAM that a model of Ollama's takes: waited for before it is loaded, and kept meanwhile.

And whether GPU tests run next to the tests that use models, before or after them: while no model
is loaded for tests, the VRAM that it will take is there for GPU tests. The three ways are simulated
with the durations that earlier runs measured, and the shortest is taken: GPU tests start whenever
they fit, the largest first; models follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.scheduler.types import (
    AFTER,
    BEFORE,
    BESIDE,
    Action,
    Note,
    OpenModel,
)
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
        found, ledgers = self._queue.groups[group].facts.reservations.items(), self._gpu.ledgers
        return [(ledgers[uuid], size) for uuid, size in found if uuid in ledgers]

    # --- tests that need VRAM beside their model ---

    def refuses(self, test: int, group: int) -> str:
        """Why a test can never run next to its own model; empty where it can."""
        need = self._gpu.need(test).vram
        devices = self.devices_of(group)
        if not devices or len(self._gpu.ledgers) > len(devices):
            return ""
        if need is None and self._gpu.jobs[test].marked:
            # Whatever it takes: it has a context.
            need = min(ledger.full.context for ledger, _ in devices)
        budget, size = max((ledger.full.budget, size) for ledger, size in devices)
        if need is None or need + size <= budget:
            return ""
        name = self._queue.groups[group].facts.name
        return (
            f"needs {format_gb(need)} of VRAM next to its model {name}, which takes "
            f"{format_gb(size)}: the largest budget is {format_gb(budget)}: lower the need, or use "
            "a smaller model or context"
        )

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
            ledger.awaited_by_model = size
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
            ledger.awaited_by_model = 0
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
                ledger.awaited_by_model = 0
            waited = self._gpu.at - self._began
            if waited >= WORTH_A_NOTE:
                name = self._queue.groups[group].facts.name
                text = f"{name} waited {waited:.1f} s for VRAM before it was loaded"
                yield Note("ollama-waited", text, {"waited_s": round(waited, 3)})
            yield OpenModel(group)
        elif text := self._lacks_leased(group):
            yield Note("ollama-not-loaded", text)
            self._queue.not_opened(group, text)
            self.release(group)
        else:
            yield from self._make_room(group)

    def _has_room(self, group: int) -> bool:
        """Whether the model can be loaded now: the server takes the device with most VRAM free."""
        devices = self.devices_of(group)
        if not devices or any(_fits(ledger, size) for ledger, size in devices):
            return True
        if any(ledger.running or ledger.reading.others.held_by_others for ledger, _ in devices):
            self._drained_at = None
            return False
        if self._drained_at is None:
            self._drained_at = self._gpu.at
        # Our tests hold nothing there any more: the server decides, as for any request.
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
        facts, who = self._queue.groups[group].facts, "; ".join(o.names for o in others if o.names)
        return (
            f"{facts.name} needs {format_gb(max(facts.reservations.values()))} of VRAM, which "
            f"other sessions have leased: waited {self._gpu.at - self._began:.0f} s: {who}"
        )

    def _make_room(self, group: int) -> Iterator[Action]:
        """Take what idle workers hold."""
        for ledger, _ in self.devices_of(group):
            for worker in self._gpu.workers_on(ledger):
                if worker.is_between_tests and not ledger.running and worker.emptied < 2:
                    yield self._reclaiming.ask(worker, withdraw=worker.emptied == 1)


def _fits(ledger: DeviceLedger, size: int) -> bool:
    """Whether so many bytes are there for a model on this device."""
    free, claimed = ledger.reading.free, ledger.reading.others.claimed
    if free is None:
        return ledger.committed <= ledger.capacity.budget - claimed
    return free - ledger.outstanding - claimed >= size


# --- next to GPU tests, before or after them ---

USUAL = 1.0
"""Seconds: the assumed duration of a test when none is known."""

MOST_TESTS = 20_000
"""Beyond so many the estimate takes too long; `beside` is never wrong by much."""


class ModelLoad(NamedTuple):
    """One model and its tests."""

    vram: int
    """Bytes that have to be free for it."""
    load: float
    """Seconds that loading it should take; 0 where it is loaded already."""
    tests: Sequence[float | None]
    """Seconds of its tests; None: unknown."""
    parallel: int = 1


class Estimate(NamedTuple):
    """How long a run should take each way."""

    seconds: dict[str, float]
    chosen: str

    @property
    def text(self) -> str:
        """The arithmetic in one line."""
        each = ", ".join(f"{way} {time:.0f} s" for way, time in self.seconds.items())
        return f"{each}: {self.chosen}"


def choose(
    gpu_tests: Sequence[tuple[int, float | None]],
    models: Sequence[ModelLoad],
    budget: int,
    workers: int,
    wanted: str = "auto",
) -> Estimate:
    """The way to run; `gpu_tests` are (bytes, seconds), `budget` is what there is without models.

    `wanted` is the setting: anything but `auto` decides. Of equal ways `beside` is taken.
    """
    if len(gpu_tests) > MOST_TESTS:
        return Estimate({}, BESIDE if wanted == "auto" else wanted)
    known = sorted(time for _, time in gpu_tests if time is not None)
    usual = known[len(known) // 2] if known else USUAL
    tests = [(size, usual if time is None else time) for size, time in gpu_tests]
    taken = [(model.vram, model.load + _work(model, usual)) for model in models]
    alone = sum(seconds for _, seconds in taken)
    free = _span(tests, [], budget, workers)
    seconds = {
        BESIDE: max(alone, _span(tests, taken, budget, workers)),
        BEFORE: alone + free,
        AFTER: free + alone,
    }
    chosen = min(seconds, key=lambda way: seconds[way]) if wanted == "auto" else wanted
    return Estimate(seconds, chosen)


def _work(model: ModelLoad, usual: float) -> float:
    times = [usual if time is None else time for time in model.tests]
    return max(sum(times) / max(1, model.parallel), max(times, default=0.0))


def _span(
    tests: Sequence[tuple[int, float]],
    taken: Sequence[tuple[int, float]],
    budget: int,
    workers: int,
) -> float:
    """Seconds until the last test ends; `taken`: (bytes, seconds) that models take in turn."""
    changes = []
    at = 0.0
    for size, seconds in taken:
        changes.append((at, budget - size))
        at += seconds
    changes.append((at, budget))
    waiting = sorted(tests, key=lambda test: (-test[0], -test[1]))
    running: list[tuple[float, int]] = []
    now = held = 0.0
    step, end = 0, 0.0
    while waiting or running:
        while step + 1 < len(changes) and changes[step + 1][0] <= now:
            step += 1
        limit, place = changes[step][1], 0
        while place < len(waiting) and len(running) < workers:
            size, seconds = waiting[place]
            if held + size <= limit or (not running and step + 1 == len(changes)):
                del waiting[place]
                held += size
                heappush(running, (now + seconds, size))
                end = max(end, now + seconds)
            else:
                place += 1
        later = changes[step + 1][0] if step + 1 < len(changes) else float("inf")
        if running and running[0][0] <= later:
            now, size = heappop(running)
            held -= size
        else:
            now = later
    return end
