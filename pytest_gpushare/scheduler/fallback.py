"""GPU tests that get no GPU: run on the CPU, skipped or failed, with the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.types import Action
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.cpu_pool import CpuPool
    from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
    from pytest_gpushare.scheduler.pressure import Pressure


class Fallback:
    """What becomes of tests that are refused, or for which there is no GPU."""

    def __init__(self, gpu: GpuPool, cpu: CpuPool, pressure: Pressure) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._pressure = pressure
        self.dropped: list[tuple[int, str]] = []
        """Tests that nobody can run or report, and why."""

    def refuse(self, refused: Mapping[int, str]) -> None:
        """Fail these tests at once: each is reported by a GPU worker."""
        for test, reason in refused.items():
            self._gpu.refuse(test, "fail", reason)
            self._gpu.pending.back(Unit([test]))

    def decide(self, test: int, reason: str) -> bool:
        """Say what becomes of a test that gets no GPU; True: a CPU worker has to see to it.

        Otherwise it is dropped, or a GPU worker can have it now: it needs nothing any more, or
        starts as soon as it is alone.
        """
        gpu, cpu = self._gpu, self._cpu
        on_gpu = any(worker.knows(test) and not worker.ending for worker in gpu.workers.values())
        on_cpu = cpu.could_run(test)
        if not (on_gpu or on_cpu):
            self.dropped.append((test, reason))
            return False
        need, how = gpu.need(test), gpu.policy.without_gpu
        if test in gpu.refusals:
            if on_gpu:
                return False
            cpu.refusals[test] = gpu.refusals[test]
            return True
        if gpu.jobs[test].marked and (need.required or how != "run"):
            asked = "required=True" if need.required else f"gpu_share_without_gpu = {how}"
            outcome = "skip" if how == "skip" and not need.required else "fail"
            text = f"no GPU for this test: {reason} ({asked})"
            if on_gpu:
                gpu.refuse(test, outcome, text)
            else:
                cpu.refusals[test] = outcome, text
            return not on_gpu
        if on_cpu:
            cpu.notes[test] = f"ran without a GPU: {reason}"
            return True
        gpu.force(test, reason)
        return False

    def _settle(self, test: int, reason: str) -> None:
        """Decide, and put the test where it goes."""
        dropped = len(self.dropped)
        if self.decide(test, reason):
            self._cpu.add([test])
        elif len(self.dropped) == dropped:
            self._gpu.pending.back(Unit([test]))
            self._gpu.note_change()

    def orphans(self) -> None:
        """Workers are gone and none will come: what no other worker can run gets no GPU."""
        gpu = self._gpu
        for unit in gpu.pending.all():
            if gpu.anybody_could(unit):
                continue
            gpu.pending.take(unit, gpu.kind(unit))
            for test in unit.tests:
                single = Unit([test])
                if gpu.anybody_could(single):
                    gpu.pending.back(single)
                    gpu.note_change()
                else:
                    self._settle(test, "no GPU worker is left that could run it")
        for test in self._cpu.orphans():
            single = Unit([test])
            if gpu.anybody_could(single):
                gpu.pending.back(single)
                gpu.note_change()
            else:
                self.dropped.append((test, "no worker that has collected it is left"))

    def sort_out(self) -> list[Action]:
        """Decide on the tests that have waited long enough for VRAM that others hold."""
        gpu = self._gpu
        actions: list[Action] = []
        gone = [
            (unit, reason)
            for unit in gpu.pending.all()
            if (reason := self._hopeless(unit.tests[0], None))
        ]
        for worker in list(gpu.gate.values()):
            test = worker.bound
            if test is None or worker.sent or worker.emptying is not None:
                continue
            if not (reason := self._hopeless(test, worker)):
                continue
            if self.decide(test, reason):
                # The fixtures that the worker keeps are for this test alone.
                actions.append(self._pressure.reclaiming.ask(worker, withdraw=True))
                self._take_back(test)
                self._cpu.add([test])
            gpu.note_change()
        for unit, reason in gone:
            gpu.pending.take(unit, gpu.kind(unit))
            # The rest of a group may fit: it stays.
            test = unit.next()
            if unit.tests:
                gpu.pending.back(unit)
                gpu.note_change()
            self._settle(test, reason)
        return actions

    def _take_back(self, test: int) -> None:
        """Take a test out again that was put back as pending, or as the next of its group."""
        gpu = self._gpu
        for unit in gpu.pending.again:
            if unit.tests[0] == test:
                gpu.pending.take(unit, gpu.kind(unit))
                unit.next()
                if unit.tests:
                    gpu.pending.back(unit)
                return
        for worker in gpu.workers.values():
            if worker.unit is not None and worker.unit.tests and worker.unit.tests[0] == test:
                worker.unit.next()

    def _hopeless(self, test: int, bound: GpuWorker | None) -> str:
        """Why the test gets no GPU; empty where it still may."""
        gpu = self._gpu
        if test in gpu.forced or test in gpu.refusals:
            return ""
        count = gpu.need(test).devices
        reason = ""
        for worker in [bound] if bound else gpu.workers.values():
            if not worker.knows(test) or worker.ending or len(worker.devices) < count:
                continue
            need = gpu.bytes_for(worker, test)
            if any(need > gpu.ledgers[d].room.budget for d in gpu.devices(worker, count)):
                continue
            found = self._pressure.gave_up(worker, test)
            if found is None:
                return ""
            device, live = found
            ledger = gpu.ledgers[device]
            by = f", held by {ledger.reading.holders}" if ledger.reading.holders else ""
            reason = (
                f"it needs {format_gb(need)}, and {format_gb(live)} was left on "
                f"{ledger.room.label} for {gpu.policy.pressure_timeout:g} s "
                f"(gpu_share_pressure_timeout_s){by}"
            )
        return reason
