"""GPU tests that get no GPU: run on the CPU, skipped or failed, with the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.types import Action, Instead, Run
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.cpu_pool import CpuSide
    from pytest_gpushare.scheduler.gpu_pool import GpuSide, GpuWorker
    from pytest_gpushare.scheduler.pressure import Waiting


class Without:
    """What becomes of tests that are refused, or for which no GPU can be had."""

    def __init__(self, gpu: GpuSide, cpu: CpuSide, waiting: Waiting) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._waiting = waiting
        self._verdicts: dict[int, tuple[str, str]] = {}
        """Test -> outcome and reason."""
        self._forced: dict[int, str] = {}
        """Tests that run on a GPU worker though there is no room, and why."""
        self.dropped: list[tuple[int, str]] = []
        """Tests that nobody can run or report, and why."""

    @property
    def waits(self) -> bool:
        """Whether a GPU worker has to be free for one of them."""
        return bool(self._verdicts or self._forced)

    def refuse(self, refused: Mapping[int, str]) -> None:
        """Tests that fail at once."""
        self._verdicts.update((test, ("fail", reason)) for test, reason in refused.items())

    def decide(self, test: int, reason: str) -> bool:
        """What becomes of a test that gets no GPU; True: a CPU worker has to see to it."""
        gpu, cpu = self._gpu, self._cpu
        on_gpu = any(it.knows(test) and not it.ending for it in gpu.workers.values())
        on_cpu = cpu.could_run(test)
        if not (on_gpu or on_cpu):
            self.dropped.append((test, reason))
            return False
        need, how = gpu.need(test), gpu.policy.without_gpu
        if gpu.jobs[test].marked and (need.required or how != "run"):
            asked = "required=True" if need.required else f"gpu_share_without_gpu = {how}"
            outcome = "skip" if how == "skip" and not need.required else "fail"
            verdict = (outcome, f"no GPU for this test: {reason} ({asked})")
            if on_gpu:
                self._verdicts[test] = verdict
            else:
                cpu.verdicts[test] = verdict
            return not on_gpu
        if on_cpu:
            cpu.notes[test] = f"ran without a GPU: {reason}"
            return True
        self._forced[test] = f"started without room on its GPU: {reason}"
        return False

    def orphans(self) -> None:
        """Workers are gone and none will come: what no other worker can run gets no GPU."""
        gpu = self._gpu
        for unit in gpu.pending.all():
            if gpu.anybody_could(unit):
                continue
            self._forget([unit])
            for test in unit.tests:
                single = Unit([test])
                if gpu.anybody_could(single):
                    gpu.pending.back(single)
                    gpu.stir()
                elif self.decide(test, "no GPU worker is left that could run it"):
                    self._cpu.add([test])
        left = [it for it in gpu.workers.values() if not it.ending]
        for test in [test for test in self._forced if not any(it.knows(test) for it in left)]:
            reason = self._forced.pop(test)
            if self.decide(test, reason):
                self._cpu.add([test])
        for test in [test for test in self._verdicts if not any(it.knows(test) for it in left)]:
            verdict = self._verdicts.pop(test)
            if self._cpu.could_run(test):
                self._cpu.verdicts[test] = verdict
                self._cpu.add([test])
            else:
                self.dropped.append((test, verdict[1]))
        for test in self._cpu.orphans():
            single = Unit([test])
            if gpu.anybody_could(single):
                gpu.pending.back(single)
                gpu.stir()
            else:
                self.dropped.append((test, "no worker that has collected it is left"))

    def _forget(self, units: list[Unit]) -> None:
        for unit in units:
            self._gpu.claims.drop(unit)
            self._gpu.pending.take(unit, self._gpu.kind(unit))

    def report(self) -> Iterator[Action]:
        """Verdicts, each by a GPU worker that has nothing to do; then tests that are forced."""
        if not self.waits:
            return
        for it in self._gpu.workers.values():
            if not it.is_free or (it.unit is not None and self._unbound()):
                continue
            test = next((test for test in self._verdicts if it.knows(test)), None)
            if test is not None:
                it.busy, it.test = True, test
                self._gpu.refresh(it)
                yield Instead(it.id, test, *self._verdicts.pop(test))
                continue
            test = next((test for test in self._forced if it.knows(test)), None)
            if test is not None and it.unit is None and self._is_alone(it):
                yield self._force(it, test, self._forced.pop(test))

    def _unbound(self) -> bool:
        return any(it.unit is None and not it.ending for it in self._gpu.workers.values())

    def _is_alone(self, it: GpuWorker) -> bool:
        return not any(
            name != it.id for device in it.devices for name in self._gpu.ledgers[device].running
        )

    def _force(self, it: GpuWorker, test: int, note: str) -> Run:
        need = self._gpu.bytes_for(it, test)
        it.busy, it.test, it.emptied = True, test, 0
        self._gpu.lonely.add(it.id)
        self._gpu.refresh(it)
        for device in self._gpu.devices(it, self._gpu.need(test).devices):
            self._gpu.ledgers[device].start(it.id, need)
        source = self._gpu.need(test).source
        return Run(it.id, (test,), True, need, source, note=note, alone=True)

    def sort_out(self) -> bool:
        """Decide on the tests that have waited long enough for VRAM that others hold."""
        gone: list[tuple[Unit, str]] = []
        for unit in self._gpu.pending.all():
            reason = self._hopeless(unit, None)
            if reason:
                gone.append((unit, reason))
        for it in self._gpu.workers.values():
            while it.is_free and it.unit is not None and it.unit.tests:
                reason = self._hopeless(it.unit, it)
                if not reason:
                    break
                test = it.unit.next()
                if self.decide(test, reason):
                    self._cpu.add([test])
            if it.is_free and it.unit is not None and not it.unit.tests:
                self._gpu.claims.drop(it.unit)
                it.unit = None
                self._gpu.refresh(it)
        for unit, reason in gone:
            self._forget([unit])
            # The rest of a group may fit: it stays.
            test = unit.next()
            if self.decide(test, reason):
                self._cpu.add([test])
            if unit.tests:
                self._gpu.pending.back(unit)
                self._gpu.stir()
        return bool(gone) or self.waits

    def _hopeless(self, unit: Unit, bound: GpuWorker | None) -> str:
        """Why the unit's next test gets no GPU; empty where it still may."""
        test = unit.tests[0]
        count = self._gpu.kind(unit)[0]
        reason = ""
        for it in [bound] if bound else self._gpu.workers.values():
            if not it.knows(test) or it.ending or len(it.devices) < count:
                continue
            need = self._gpu.bytes_for(it, test)
            if any(need > self._gpu.ledgers[d].room.budget for d in self._gpu.devices(it, count)):
                continue
            found = self._waiting.gave_up(it, unit)
            if found is None:
                return ""
            device, live = found
            ledger = self._gpu.ledgers[device]
            by = f", held by {ledger.reading.holders}" if ledger.reading.holders else ""
            reason = (
                f"it needs {format_gb(need)}, and {format_gb(live)} was left on "
                f"{ledger.room.label} for {self._gpu.policy.pressure_timeout:g} s "
                f"(gpu_share_pressure_timeout_s){by}"
            )
        return reason
