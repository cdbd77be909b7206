"""Which test goes where and when: events in, actions out. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pytest_gpushare.plan.needs import Need
from pytest_gpushare.plan.work import (
    Action,
    Instead,
    Job,
    Lost,
    Policy,
    Reading,
    Room,
    Run,
    Shutdown,
    Worker,
)
from pytest_gpushare.units import format_gb


class Dispatcher:
    """Routing, order and admission of the tests of one run."""

    def __init__(
        self, tests: Sequence[Job], rooms: Sequence[Room], policy: Policy | None = None
    ) -> None:
        self._tests = tests
        self._rooms = {room.uuid: room for room in rooms}
        self._policy = policy or Policy()
        self._pending = list(range(len(tests)))
        self._left = len(tests)
        self._workers: dict[str, Worker] = {}
        self._collected: dict[str, Collection[int] | None] = {}
        self._queues: dict[str, list[int]] = {}
        self._needs: dict[str, int] = {}
        self._held: dict[str, Mapping[str, int]] = {}
        self._ending: set[str] = set()
        self._alone: set[int] = set()
        self._expected = 0

    @property
    def is_done(self) -> bool:
        """Whether every test has had its outcome."""
        return not self._left

    @property
    def wants_step(self) -> bool:
        """Whether a step may do something though no event comes: tests wait for VRAM."""
        return bool(self._pending)

    @property
    def wants_reading(self) -> bool:
        """Whether the next step decides by live VRAM."""
        return any(self._tests[t].marked for t in self._pending)

    def worker_up(self, worker: Worker, collected: Collection[int] | None = None) -> None:
        """A worker is ready; `collected` are the tests that it knows, None: all."""
        self._workers[worker.id] = worker
        self._collected[worker.id] = collected
        self._queues[worker.id] = []
        self._expected = max(0, self._expected - 1)

    def worker_down(self, worker: str, *, replaced: bool = False) -> Lost:
        """A worker has ended or died; `replaced`: another takes its place soon.

        The test that it ran is over, as crashed; the others that it had are dispatched anew.
        """
        self._expected += replaced
        self._workers.pop(worker, None)
        self._ending.discard(worker)
        self._needs.pop(worker, None)
        self._held.pop(worker, None)
        queue = self._queues.pop(worker, [])
        if not queue:
            return Lost()
        self._left -= 1
        self._pending[:0] = queue[1:]
        return Lost(queue[0], tuple(queue[1:]))

    def finished(
        self,
        worker: str,
        test: int,
        held: Mapping[str, int] | None = None,
        duration: float | None = None,  # noqa: ARG002
    ) -> bool:
        """The worker has done the test, and holds so many bytes of each device (UUID) now.

        Returns whether a step would do something.
        """
        self._left -= 1
        self._queues[worker].remove(test)
        self._needs.pop(worker, None)
        self._held[worker] = held or {}
        return True

    def emptied(self, worker: str, held: Mapping[str, int] | None = None) -> None:
        """The worker has emptied its caches as `EmptyCaches` asked."""
        self._held[worker] = held or {}

    def again(self, test: int, *, alone: bool = False) -> None:
        """Dispatch once more a test that is over; `alone`: no other on its device meanwhile."""
        self._left += 1
        self._pending.append(test)
        if alone:
            self._alone.add(test)

    def step(self, readings: Mapping[str, Reading], at: float) -> list[Action]:  # noqa: ARG002
        """What is to be done now.

        `readings` are the devices as last read, by UUID; `at` is the time in seconds by any
        clock that does not go back.
        """
        actions: list[Action] = []
        for worker in sorted(self._workers.values(), key=lambda w: bool(w.devices)):
            if not self._queues[worker.id] and worker.id not in self._ending:
                action = self._next(worker, readings)
                if action is not None:
                    actions.append(action)
        if not self._left:
            idle = self._workers.keys() - self._ending
            self._ending |= idle
            actions += [Shutdown(worker) for worker in sorted(idle)]
        return actions

    def _next(self, worker: Worker, readings: Mapping[str, Reading]) -> Action | None:
        known = self._collected[worker.id]
        for test in self._pending:
            if known is not None and test not in known:
                continue
            action = self._admit(worker, test, readings)
            if action is not None:
                self._pending.remove(test)
                self._queues[worker.id].append(test)
                return action
        return None

    def _admit(self, worker: Worker, test: int, readings: Mapping[str, Reading]) -> Action | None:
        it = self._tests[test]
        if not it.marked and self._has_cpu_workers:
            return Run(worker.id, (test,))
        if not worker.devices:
            return None
        need = it.need or Need()
        vram = worker.slot if need.vram is None else need.vram
        largest = max(room.budget for room in self._rooms.values())
        if vram > largest:
            reason = f"needs {format_gb(vram)}, the largest budget is {format_gb(largest)}"
            return Instead(worker.id, test, "fail", reason)
        if vram > self._room(worker.devices[0], worker.id, readings):
            return None
        self._needs[worker.id] = vram
        return Run(worker.id, (test,), need=vram, source=need.source)

    @property
    def _has_cpu_workers(self) -> bool:
        return any(not worker.devices for worker in self._workers.values())

    def _room(self, device: str, but: str, readings: Mapping[str, Reading]) -> int:
        room = self._rooms[device]
        used = live = 0
        reading = readings.get(device, Reading())
        for worker in self._workers.values():
            if worker.id != but and worker.devices[:1] == (device,):
                held = reading.held.get(worker.id) or self._held.get(worker.id, {}).get(device, 0)
                need = self._needs.get(worker.id, 0)
                used += max(need, held)
                live += max(0, need - held)
        left = room.budget - used
        if reading.free is None:
            return left
        resident = room.resident if reading.resident is None else reading.resident
        outstanding = max(0, room.reservation - resident)
        return min(left, reading.free - outstanding - room.safety_buffer - live)
