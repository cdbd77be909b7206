"""Advice on random machines: every suggestion, typed and planned again, gives what it promises."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, HostFacts
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.report.candidates import Advice, Case, case_of, more_room
from pytest_gpushare.report.results import Results
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.session.tests import PhaseReport
from pytest_gpushare.units import GB, MB

HERE = Path("/nowhere")
CONTEXT = 600 * MB


class RandomMachine(NamedTuple):
    """A host with its Ollama, its user's settings, and the plan for them."""

    ini: dict[str, str]
    gpus: GpuFacts
    ollama: OllamaFacts
    host: HostFacts
    request: Request

    def settings(self, overrides: dict[str, str]) -> Settings:
        return load(Written({}, overrides, self.ini, "pytest.ini", HERE, HERE, HERE))

    def plan(self, settings: Settings) -> Plan:
        return plan_run(settings, self.gpus, {OLLAMA: self.ollama}, self.host, self.request)


def random_machine(seed: int) -> RandomMachine:
    r = random.Random(seed)
    devices, models = [], []
    answered = r.random() < 0.7
    for index in range(r.choice([1, 1, 1, 2, 3])):
        total = r.choice([4, 6, 8, 10, 12, 16, 24, 48]) * GB
        resident = 0
        processes: tuple[GpuProcess, ...] | None = ()
        if answered and r.random() < 0.4 and not models:
            resident = int(r.uniform(0.1, 0.6) * total)
            models.append(LoadedModel(f"m{index}:7b", resident, resident, f"{index:064d}", 4096))
            hidden = r.random() < 0.5
            processes = None if hidden else (GpuProcess(5, resident + 512 * MB, OLLAMA),)
            resident += 512 * MB
        others = int(r.uniform(0, 0.5) * (total - resident))
        used = resident + others
        devices.append(
            Device(f"GPU-{index:04d}", "card", str(index), total, used, total - used,
                   processes=processes)
        )  # fmt: skip
    presets = ["conservative", "conservative", "aggressive", "ultra-conservative", "packed"]
    ini = {"gpu_share_config": "", "gpu_share_preset": r.choice(presets)}
    if r.random() < 0.3:
        ini["gpu_share_min_vram_per_worker_gb"] = str(r.choice([1.5, 2, 4, 5, 6, 8]))
    if r.random() < 0.3:
        ini["gpu_share_ollama_vram_reservation_mb"] = str(r.choice([2048, 6000, 8192, 16384]))
    if r.random() < 0.2:
        ini["gpu_share_ollama_gpu"] = "0"
    ollama = OllamaFacts(asked=True, answered=answered, reachable=answered, models=tuple(models))
    number = r.choice([None, None, None, 1, 2, 4])
    gpus = GpuFacts(tuple(devices), tuple(devices))
    return RandomMachine(ini, gpus, ollama, HostFacts(r.choice([2, 8, 32])), Request(number))


def case(machine: RandomMachine, need: int = 0) -> Case:
    settings = machine.settings({})
    plan = machine.plan(settings)
    facts = StartFacts(settings, machine.gpus, {OLLAMA: machine.ollama}, plan, replan=machine.plan)
    found = case_of(ActiveRun(facts))
    assert found is not None
    return found._replace(need=need)


def check(machine: RandomMachine, before: Case, advice: Advice) -> None:
    """What is typed gives the plan that is promised, and keeps what Ollama's models need."""
    typed = dict(setting.split("=") for setting in advice.settings.split(" ") if setting)
    settings = machine.settings(typed)
    plan = machine.plan(settings)
    assert plan == before.planned(advice.changes), advice
    assert len(plan.slots) >= advice.workers, advice
    assert min((slot.vram for slot in plan.slots), default=0) >= advice.slot, advice
    if "ollama_vram_reservation" in advice.changes:
        assert (settings.ollama_vram_reservation or 0) >= before.models, advice
    assert all(f"-o {name}={value}" in advice.text for name, value in typed.items())


def would_fit(machine: RandomMachine, before: Case) -> bool:
    """Whether any reservation that holds the models leaves a worker: all of them are tried."""
    least = max(before.models, 2 * GB)
    kept = max(device.reservation for device in before.plan.devices)
    for size in range(-(-least // MB), kept // MB, 64):
        plan = before.planned({"ollama_vram_reservation": Fraction(size * MB)})
        if plan.slots and min(slot.vram for slot in plan.slots) >= before.least_slot:
            return True
    return False


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_room_for_a_worker(start: int) -> None:
    """300 machines: where no GPU worker fits, each way to one is right, and none is missed."""
    without = 0
    for seed in range(start, start + 50):
        machine = random_machine(seed)
        need = random.Random(-seed - 1).choice([0, 0, 3, 5]) * GB
        before = case(machine, need)
        found = more_room(before)
        for advice in found:
            check(machine, before, advice)
            assert advice.workers > len(before.plan.slots)
        if not before.plan.slots:
            without += 1
            changed = [key for advice in found for key in advice.changes]
            if would_fit(machine, before):
                assert "ollama_vram_reservation" in changed or "ollama_gpu" in changed, seed
    assert without > 5


def run_of(machine: RandomMachine, seed: int) -> ActiveRun:
    """Tests with random peaks and outcomes on the workers of the plan."""
    r = random.Random(seed)
    settings = machine.settings({})
    run = ActiveRun(
        StartFacts(
            settings,
            machine.gpus,
            {OLLAMA: machine.ollama},
            machine.plan(settings),
            machine.plan,
        )
    )
    for number in range(run.plan.workers):
        run.workers.join(f"gw{number}", number, 0.0)
    small = r.random() < 0.5
    for at in range(20):
        number = at % max(1, run.plan.workers)
        worker, nodeid, marked = f"gw{number}", f"t.py::test_{at}", r.random() < 0.7
        on_gpu = number < len(run.plan.slots)
        if on_gpu and r.random() < 0.9:
            most = run.plan.slots[number].vram * (0.5 if small else 1.3)
            peak = max(0, int(r.uniform(0.1, 1) * most) - CONTEXT)
            told = {"nodeid": nodeid, "peak": peak, "exact": r.random() < 0.8, "left": 0}
            run.links.receive(worker, ("test", told))
        if on_gpu and r.random() < 0.3:
            run.tests.need(nodeid, r.choice([1, 3, 6]) * GB, r.choice(["marker", "slot"]))
        fails = marked and not on_gpu and r.random() < 0.5
        for when in ("setup", "call", "teardown"):
            outcome = "failed" if fails and when == "call" else "passed"
            run.tests.reported(
                worker, PhaseReport(nodeid, when, outcome, False, at, at + 1, marked)
            )
        if on_gpu and r.random() < 0.05:
            run.record.note("oom", f"{nodeid} ran out of VRAM", nodeid=nodeid, held={})
            run.record.note("oom-retried", "", nodeid=nodeid, outcome="passed")
    return run


def failed_for_want_of_vram(run: ActiveRun) -> bool:
    failed = any(t.marked and t.outcome == "failed" for t in run.tests)
    return (failed and not run.plan.slots) or bool(run.record.events("oom"))


def advice_of(run: ActiveRun) -> Iterator[Advice]:
    found = Results(run).assessment
    yield from found.advice
    yield from found.needs


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_after_a_run(start: int) -> None:
    """300 runs: each suggestion is right, and no lack of VRAM goes unsaid."""
    count = 0
    for seed in range(start, start + 50):
        machine = random_machine(seed)
        run = run_of(machine, seed)
        before = case(machine)
        for advice in advice_of(run):
            count += 1
            check(machine, before, advice)
            assert advice.changes or advice.action
        if failed_for_want_of_vram(run):
            assert Results(run).assessment.shortages, seed
    assert count > 20


def first_change(advice: list[Advice]) -> Any:
    return [each.settings for each in advice]


def one(free: float, total: float, **ini: str) -> Case:
    free_bytes, size = int(free * GB), int(total * GB)
    device = Device("GPU-0000", "card", "0", size, size - free_bytes, free_bytes)
    answered = OllamaFacts(asked=True, answered=True, reachable=True)
    machine = RandomMachine(
        {"gpu_share_config": "", **{f"gpu_share_{key}": value for key, value in ini.items()}},
        GpuFacts((device,), (device,)), answered, HostFacts(8), Request(),
    )  # fmt: skip
    return case(machine)


def test_small_cards() -> None:
    """The reservation is lowered to what fits, not to what the default lacks; or not at all."""
    reservation = "gpu_share_ollama_vram_reservation_mb"
    assert first_change(more_room(one(9.5, 10)))[0] == f"{reservation}=5632"
    assert (
        first_change(more_room(one(11.5, 12, min_vram_per_worker_gb="5.0")))[0]
        == f"{reservation}=5632"
    )
    assert first_change(more_room(one(7.5, 8)))[0] == f"{reservation}=3584"
    (only,) = more_room(one(3.6, 4))
    assert only.settings == "gpu_share_ollama_gpu=none gpu_share_min_vram_per_worker_gb=2.5"
    assert "a smaller model, a smaller context or the CPU" in only.text
