"""Which tests go to which kind of worker, which can never run, and what becomes of them.

GPU tests that get no GPU are run on the CPU, skipped or failed, with the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.types import Action, Job
from pytest_gpushare.units import format_gb, plural

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.pressure import Pressure


class Routes(NamedTuple):
    """The tests by what becomes of them."""

    gpu: list[int]
    cpu: list[int]
    refused: dict[int, str]
    """Test -> why it fails at once."""
    without_gpu: dict[int, str]
    """Marked tests that only CPU workers have collected, and the reason to give."""


def routes(jobs: Sequence[Job], gpu: GpuPool, cpu: CpuPool) -> Routes:
    """Marked tests go to GPU workers, all others to CPU workers where there are any."""
    result = Routes([], [], {}, {})
    largest = _Largest(gpu)
    one_has_all = any(worker.collected is None for worker in gpu.workers.values())
    all_cpu = cpu.knows_all
    has_cpu = bool(cpu.workers)
    all_have_all = all(worker.collected is None for worker in gpu.workers.values())
    for number, job in enumerate(jobs):
        on_gpu = one_has_all or any(worker.knows(number) for worker in gpu.workers.values())
        on_cpu = all_cpu or (has_cpu and cpu.could_run(number))
        if job.refusal:
            result.refused[number] = job.refusal
        elif not job.marked and on_cpu:
            result.cpu.append(number)
        elif not on_gpu:
            if on_cpu:
                result.without_gpu[number] = "no GPU worker has collected it"
            else:
                result.gpu.append(number)
        elif reason := largest.problem(job) or _too_large(number, gpu, all_have_all):
            result.refused[number] = reason
        else:
            result.gpu.append(number)
    return result


def _too_large(test: int, gpu: GpuPool, all_have_all: bool) -> str:
    if all_have_all or gpu.any_worker_can_run(Unit([test])):
        return ""
    need = gpu.need(test).vram or 0
    return f"needs {format_gb(need)} of VRAM, more than the workers have that collected it"


class _Largest:
    """The largest need that any worker can ever meet, by number of devices."""

    def __init__(self, gpu: GpuPool) -> None:
        self._policy = gpu.policy
        self._capacities = {uuid: ledger.capacity for uuid, ledger in gpu.ledgers.items()}
        self._seen = max((len(worker.devices) for worker in gpu.workers.values()), default=0)
        self._most: dict[int, tuple[int, str]] = {}
        for count in range(1, self._seen + 1):
            found = [
                (min(self._capacities[d].budget for d in seen), self._capacities[seen[0]].label)
                for worker in gpu.workers.values()
                if len(seen := worker.devices[:count]) == count
            ]
            self._most[count] = max(found, default=(0, ""))
        gpu.settle({count: most for count, (most, _) in self._most.items()})

    def problem(self, job: Job) -> str:
        """Why no worker can ever run the test: need, largest budget and remedy; or nothing."""
        need = job.need
        if need is None:
            return ""
        if need.devices > self._seen:
            if self._policy.visible_devices == "own" and len(self._capacities) >= need.devices:
                return (
                    f"needs {plural(need.devices, 'device')}, and a worker sees its own alone "
                    "(gpu_share_visible_devices = own): set it to all"
                )
            return (
                f"needs {plural(need.devices, 'device')}, and this run has "
                f"{len(self._capacities)}: run it where there are more, or leave it out with -m "
                "or -k"
            )
        most, label = self._most[need.devices]
        if need.vram is None or need.source == "learned" or need.vram <= most:
            return ""
        each = " on each device" if need.devices > 1 else ""
        declared = {"rule": "gpu_share_vram", "marker": "its marker"}.get(need.source, need.source)
        return (
            f"needs {format_gb(need.vram)} of VRAM{each} (by {declared}), and the largest budget "
            f"is {format_gb(most)} ({label}): lower the need, or leave more to the tests with "
            "gpu_share_ollama_vram_reservation_mb, gpu_share_safety_buffer_mb or free VRAM"
        )


class Fallback:
    """What becomes of tests that are refused, or for which there is no GPU."""

    def __init__(self, gpu: GpuPool, cpu: CpuPool, pressure: Pressure) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._pressure = pressure
        self.dropped: list[tuple[int, str]] = []
        """Tests that nobody can run or report, and why."""
        self.is_due = False
        """Whether tests may be pending that no worker which is left can run."""
        self._lent: set[int] = set()
        """Tests for which there would be VRAM without the leases of other sessions."""

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
        is_lent = test in self._lent
        if is_lent or (gpu.jobs[test].marked and (need.required or how != "run")):
            asked = "required=True" if need.required else f"gpu_share_without_gpu = {how}"
            outcome = "skip" if how == "skip" and not need.required else "fail"
            text = f"no GPU for this test: {reason}"
            text += "" if is_lent and outcome == "fail" else f" ({asked})"
            if on_gpu:
                gpu.refuse(test, outcome, text)
            else:
                cpu.refusals[test] = outcome, text
            return not on_gpu
        if on_cpu:
            if gpu.jobs[test].marked:
                cpu.notes[test] = f"ran without a GPU: {reason}"
            return True
        gpu.force(test, reason)
        return False

    def settle(self, test: int, reason: str) -> None:
        """Decide, and put the test where it goes."""
        dropped = len(self.dropped)
        if self.decide(test, reason):
            self._cpu.add([test])
        elif len(self.dropped) == dropped:
            self._gpu.pending.back(Unit([test]))
            self._gpu.note_change()

    def orphans(self) -> None:
        """Workers are gone and none will come: what no other worker can run gets no GPU."""
        gpu, self.is_due = self._gpu, False
        for unit in gpu.pending.all():
            if gpu.any_worker_can_run(unit):
                continue
            gpu.pending.take(unit)
            for test in unit.tests:
                single = Unit([test])
                if gpu.any_worker_can_run(single):
                    gpu.pending.back(single)
                    gpu.note_change()
                else:
                    self.settle(test, "no GPU worker is left that could run it")
        for test in self._cpu.orphans():
            single = Unit([test])
            if gpu.any_worker_can_run(single):
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
        for worker in list(gpu.waiting.values()):
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
            gpu.pending.take(unit)
            # The rest of a group may fit: it stays.
            test = unit.next()
            if unit.tests:
                gpu.pending.back(unit)
                gpu.note_change()
            self.settle(test, reason)
        return actions

    def _take_back(self, test: int) -> None:
        """Take a test out again that was put back as pending, or as the next of its group."""
        gpu = self._gpu
        for unit in gpu.pending.again:
            if unit.tests[0] == test:
                gpu.pending.take(unit)
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
            if any(need > gpu.ledgers[d].capacity.budget for d in gpu.devices(worker, test)):
                continue
            found = self._pressure.gave_up(worker, test)
            if found is None:
                return ""
            device, live = found
            ledger = gpu.ledgers[device]
            others = ledger.reading.others
            by = f", held by {ledger.reading.holders}" if ledger.reading.holders else ""
            if others.names:
                by += f", leased by {others.names}"
            if need <= live + others.held_by_others:
                # It may not take what another session counts on.
                self._lent.add(test)
            reason = (
                f"it needs {format_gb(need)}, and {format_gb(live)} was left on "
                f"{ledger.capacity.label} for {gpu.policy.pressure_timeout:g} s "
                f"(gpu_share_pressure_timeout_s){by}"
            )
        return reason
