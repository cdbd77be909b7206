"""Claims: how a test that was overtaken often enough gets its turn.

Backfill lets small tests start while a big one waits. After `patience` of them the big one
has a claim on its devices: from then on only tests start that fit beside it, so it waits for
no test that was admitted later. Claims on a device are served one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.queue import Kind, Unit

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.gpu_pool import GpuSide, GpuWorker


@dataclass(eq=False)
class Claim:
    """A unit that waits for its devices."""

    unit: Unit
    worker: GpuWorker | None
    """The worker that it is bound to; None: any on its device."""
    devices: tuple[str, ...]
    need: int
    exclusive: bool
    serial: int
    """The number of the last admission before it."""


class Claims:
    """The claims of a run, by device."""

    def __init__(self, side: GpuSide) -> None:
        self._side = side
        self._queues: dict[str, list[Claim]] = {}
        self.exist = False
        """Whether a test may claim a device: most runs never come to that."""

    @property
    def patience(self) -> int:
        """How many tests may overtake one whose turn it is."""
        return 3 * max(1, len(self._side.workers))

    def head(self, device: str) -> Claim | None:
        """The claim that is served next on the device."""
        queue = self._queues.get(device) if self.exist else None
        return queue[0] if queue else None

    def allow(self, it: GpuWorker, unit: Unit, need: int, kind: Kind, device: str) -> bool:
        """Whether this test may start though others claim the device."""
        claim = self.head(device)
        if claim is None or claim.unit is unit or self._is_out_of_reach(claim, device):
            return True
        side, ledger = self._side, self._side.ledgers[device]
        if it.unit is unit and (
            claim.worker is it or (claim.worker is None and not self._is_served(claim, device))
        ):
            # Who is to serve the claim has begun something, and must go on first.
            return True
        if claim.exclusive or kind[1] or claim.worker is it:
            return False
        left = ledger.room.budget - claim.need
        free_later = False
        for name in ledger.accounts:
            other = side.workers.get(name)
            if other is None or other is it or other is claim.worker:
                continue
            later = other.busy and other.serial > claim.serial
            left -= ledger.accounts[name].committed if later else ledger.floor(name)
            if not later and not other.ending and self._could_serve(claim, other, device):
                free_later = True
        return need <= left and (claim.worker is not None or free_later)

    def admitted(self, it: GpuWorker, unit: Unit, devices: tuple[str, ...]) -> None:
        """A test was admitted: whoever was overtaken is nearer to a claim."""
        if unit.claims:
            self.drop(unit)
        side = self._side
        front = side.pending.front()
        if front is not None and (unit.rank < 0 or front.rank < unit.rank):
            self._overtaken(front, None)
        for device in devices:
            for other in side.free[device].values():
                begun = other.unit
                if begun is not None and begun.tests and other is not it:
                    self._overtaken(begun, other)

    def drop(self, unit: Unit) -> None:
        """The unit claims nothing any more."""
        if unit.claims:
            unit.claims = False
            self._drop(lambda claim: claim.unit is unit)

    def drop_worker(self, it: GpuWorker) -> None:
        """The worker is gone: nothing is bound to it any more, or waits for one like it."""
        others = [other for other in self._side.workers.values() if other.device == it.device]

        def is_over(claim: Claim) -> bool:
            if claim.worker is not None:
                return claim.worker is it
            is_here = claim.devices[0] == it.device
            return is_here and not any(self._side.could(other, claim.unit) for other in others)

        self._drop(is_over)

    def _drop(self, is_over: Callable[[Claim], bool]) -> None:
        for device, queue in self._queues.items():
            for claim in [claim for claim in queue if is_over(claim)]:
                claim.unit.claims = False
                queue.remove(claim)
                self._side.stir(device)
        self.exist = any(self._queues.values())

    def _overtaken(self, unit: Unit, worker: GpuWorker | None) -> None:
        unit.overtaken += 1
        if unit.claims or unit.overtaken < self.patience:
            return
        side = self._side
        kind = side.kind(unit)
        worker = worker or self._best(unit)
        if worker is None:
            return
        devices = side.devices(worker, kind[0])
        need = side.bytes_for(worker, unit.tests[0])
        bound = (
            worker if worker.unit is unit or kind[0] > 1 or worker.collected is not None else None
        )
        claim = Claim(unit, bound, devices, need, kind[1], side.serial)
        unit.claims = True
        for device in devices:
            # In all queues at once, so that two claims never wait for each other.
            self._queues.setdefault(device, []).append(claim)
        self.exist = True

    def _best(self, unit: Unit) -> GpuWorker | None:
        """The worker on the device with the most room for it and the fewest claims."""
        side = self._side
        candidates = [it for it in side.workers.values() if side.enters(it, unit)]
        return max(
            candidates,
            key=lambda it: (
                -len(self._queues.get(it.device, ())),
                it.unit is None,
                side.ledgers[it.device].left(it.id),
            ),
            default=None,
        )

    def _is_served(self, claim: Claim, device: str) -> bool:
        return any(self._could_serve(claim, it, device) for it in self._side.workers.values())

    def _could_serve(self, claim: Claim, it: GpuWorker, device: str) -> bool:
        if it.device != device or it.is_bound:
            return False
        return self._side.enters(it, claim.unit)

    def _is_out_of_reach(self, claim: Claim, device: str) -> bool:
        """Whether it would not fit though all our tests were over: others hold the VRAM."""
        ledger = self._side.ledgers[device]
        if ledger.reading.free is None:
            return False
        # What is set aside beyond what tests will still take is there already, and comes back.
        ours = ledger.committed - ledger.outstanding
        return ledger.reading.free - ledger.kept + ours < claim.need
