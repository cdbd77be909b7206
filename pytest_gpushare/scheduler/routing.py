"""Which tests go to which kind of worker, which can never run, and what becomes of them.

GPU tests that get no GPU are run on the CPU, skipped or failed, with the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.scheduler.cpu_pool import CpuPool
from pytest_gpushare.scheduler.gpu_pool import GpuPool, GpuWorker
from pytest_gpushare.scheduler.pressure import Pressure, held_by
from pytest_gpushare.scheduler.queue import Unit
from pytest_gpushare.scheduler.types import Action, Job
from pytest_gpushare.units import format_gb, plural


class Routes(NamedTuple):
    """The tests by what becomes of them."""

    gpu: list[int]
    cpu: list[int]
    refused: dict[int, str]
    """Test -> why it fails at once."""
    without_gpu: dict[int, str]
    """Marked tests that only CPU workers have collected, and the reason to give."""


def routes(gpu: GpuPool, cpu: CpuPool) -> Routes:
    """Marked tests go to GPU workers, all others to CPU workers where there are any."""
    result = Routes([], [], {}, {})
    largest = _largest(gpu)
    gpu.set_largest({count: most for count, (most, _) in largest.items()})
    for number, job in enumerate(gpu.jobs):
        on_gpu = any(worker.knows(number) for worker in gpu.workers.values())
        on_cpu = cpu.could_run(number)
        if job.refusal:
            result.refused[number] = job.refusal
        elif not job.marked and on_cpu:
            result.cpu.append(number)
        elif on_cpu and not on_gpu:
            result.without_gpu[number] = "no GPU worker has collected it"
        elif on_gpu and (reason := _problem(job, largest, gpu) or _too_large(number, gpu)):
            result.refused[number] = reason
        else:
            result.gpu.append(number)
    return result


def _largest(gpu: GpuPool) -> dict[int, tuple[int, str]]:
    """Number of devices -> the largest need on each that any worker can ever meet, and where."""
    found: dict[int, tuple[int, str]] = {}
    for worker in gpu.workers.values():
        label = gpu.ledgers[worker.device].capacity.label
        for count, most in worker.most.items():
            found[count] = max(found.get(count, (0, "")), (most, label))
    return found


def _problem(job: Job, largest: Mapping[int, tuple[int, str]], gpu: GpuPool) -> str:
    """Why no worker can ever run the test: need, largest budget and remedy; or nothing."""
    need = job.need
    if need is None:
        return ""
    if need.devices not in largest:
        wanted, there = plural(need.devices, "device"), len(gpu.ledgers)
        if gpu.policy.visible_devices == "own" and there >= need.devices:
            return (
                f"needs {wanted}, and a worker sees its own alone (gpu_share_visible_devices = "
                "own): set it to all"
            )
        return (
            f"needs {wanted}, and this run has {there}: run it where there are more, or leave it "
            "out with -m or -k"
        )
    most, label = largest[need.devices]
    if need.vram is None or need.source == "learned" or need.vram <= most:
        return ""
    each = " on each device" if need.devices > 1 else ""
    declared = {"rule": "gpu_share_vram", "marker": "its marker"}.get(need.source, need.source)
    return (
        f"needs {format_gb(need.vram)} of VRAM{each} (by {declared}), and the largest budget "
        f"is {format_gb(most)} ({label}): lower the need, or leave more to the tests with "
        "gpu_share_ollama_vram_reservation_mb, gpu_share_safety_buffer_mb or free VRAM"
    )


def _too_large(test: int, gpu: GpuPool) -> str:
    if gpu.any_worker_can_run(Unit([test])):
        return ""
    need = gpu.need(test).vram or 0
    return f"needs {format_gb(need)} of VRAM, more than the workers have that collected it"


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
            self._gpu.put_back(Unit([test]))

    def decide(self, test: int, reason: str) -> str:
        """Say what becomes of a test that gets no GPU, and where: `cpu`, `gpu` or `nowhere`.

        A GPU worker can have it now: it needs nothing any more, or starts as soon as it is alone.
        """
        gpu, cpu = self._gpu, self._cpu
        on_gpu = any(worker.knows(test) and not worker.ending for worker in gpu.workers.values())
        on_cpu = cpu.could_run(test)
        if not (on_gpu or on_cpu):
            self.dropped.append((test, reason))
            return "nowhere"
        refusal = gpu.refusals.get(test) or self._refusal(test, reason)
        if refusal is not None and on_gpu:
            gpu.refuse(test, *refusal)
        elif refusal is not None:
            cpu.refusals[test] = refusal
        elif not on_cpu:
            gpu.force(test, reason)
        elif gpu.jobs[test].marked:
            cpu.notes[test] = f"ran without a GPU: {reason}"
        return "gpu" if not on_cpu or (refusal is not None and on_gpu) else "cpu"

    def _refusal(self, test: int, reason: str) -> tuple[str, str] | None:
        """Outcome and reason of a test that is not to run without a GPU."""
        need, how, is_lent = self._gpu.need(test), self._gpu.policy.without_gpu, test in self._lent
        is_meant = self._gpu.jobs[test].marked and (need.required or how != "run")
        if not (is_lent or is_meant):
            return None
        asked = "required=True" if need.required else f"gpu_share_without_gpu = {how}"
        outcome = "skip" if how == "skip" and not need.required else "fail"
        text = f"no GPU for this test: {reason}"
        return outcome, text if is_lent and outcome == "fail" else f"{text} ({asked})"

    def reroute(self, test: int, reason: str, since: float | None = None) -> None:
        """Decide, and put the test where it goes. `since`: when it began to wait for VRAM."""
        where = self.decide(test, reason)
        if where == "cpu":
            self._to_cpu(test, since)
        elif where == "gpu":
            unit = Unit([test])
            unit.since = since
            self._gpu.put_back(unit)

    def _to_cpu(self, test: int, since: float | None) -> None:
        if since is not None:
            self._cpu.waited[test] = self._gpu.at - since
        self._cpu.add([test])

    def decide_unrunnable(self) -> None:
        """Workers are gone and none will come: what no other worker can run gets no GPU."""
        gpu, self.is_due = self._gpu, False
        for unit in gpu.pending.all():
            if gpu.any_worker_can_run(unit):
                continue
            gpu.pending.take(unit)
            for test in unit.tests:
                if gpu.any_worker_can_run(single := Unit([test])):
                    gpu.put_back(single)
                else:
                    self.reroute(test, "no GPU worker is left that could run it")
        for test in self._cpu.take_unrunnable():
            if gpu.any_worker_can_run(single := Unit([test])):
                gpu.put_back(single)
            else:
                self.dropped.append((test, "no worker that has collected it is left"))

    def decide_given_up(self) -> list[Action]:
        """Decide on the tests that have waited long enough for VRAM that others hold."""
        gpu = self._gpu
        actions: list[Action] = []
        gone = [
            (unit, reason)
            for unit in gpu.pending.all()
            if (reason := self._why_given_up(unit.tests[0], None))
        ]
        for worker in list(gpu.waiting.values()):
            test = worker.bound
            if test is None or not worker.is_between_tests:
                continue
            if not (reason := self._why_given_up(test, worker)):
                continue
            if self.decide(test, reason) == "cpu":
                # The fixtures that the worker keeps are for this test alone.
                since, worker.bound, worker.waiting_since = worker.waiting_since, None, None
                actions.append(self._pressure.reclaiming.ask(worker, withdraw=True))
                self._to_cpu(test, since)
            gpu.note_change()
        for unit, reason in gone:
            gpu.pending.take(unit)
            # The rest of a group may fit: it stays.
            test, since, unit.since = unit.next(), unit.since, None
            if unit.tests:
                gpu.put_back(unit)
            self.reroute(test, reason, since)
        return actions

    def _why_given_up(self, test: int, bound: GpuWorker | None) -> str:
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
            if need <= live + ledger.reading.others.held_by_others:
                # It must not take what another session has leased.
                self._lent.add(test)
            reason = (
                f"it needs {format_gb(need)}, and {format_gb(live)} was left on "
                f"{ledger.capacity.label} for {gpu.policy.pressure_timeout:g} s "
                f"(gpu_share_pressure_timeout_s){held_by(ledger, ', ')}"
            )
        return reason
