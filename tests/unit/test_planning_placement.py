"""Placement as a function of plan and surroundings: what holds for every fleet."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.gpu.devices import Device, GpuFacts, HostFacts
from pytest_gpushare.gpu.nvml import visible
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts
from pytest_gpushare.planning.placement import (
    PlacementContext,
    slot_of_outer_run,
    worker_environment,
)
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.units import GB

from .test_planning_sizing import DEFAULTS, fleets

AROUND = PlacementContext({}, {})


def planned(devices: tuple[Device, ...], seen: tuple[Device, ...], number: int | None) -> Plan:
    """A plan in which nothing but the budget counts."""
    settings = DEFAULTS._replace(
        ollama_vram_reservation=Fraction(0),
        max_workers_per_gb=Fraction(0),
        max_workers_per_gpu=0,
    )
    facts = GpuFacts(seen, devices)
    return plan_run(settings, facts, {OLLAMA: OllamaFacts()}, HostFacts(64), Request(number))


@given(fleets(), st.data(), st.none() | st.integers(1, 40))
def test_no_worker_outside_the_outer_visibility(
    fleet: tuple[Device, ...], data: st.DataObject, number: int | None
) -> None:
    """Every worker sees one device that the outer variable shows; no device is over budget."""
    named = data.draw(st.lists(st.sampled_from(fleet), min_size=1, unique=True))
    outer = ",".join(data.draw(st.sampled_from([d.uuid, d.index])) for d in named)
    seen = visible(fleet, outer, "PCI_BUS_ID").devices
    plan = planned(fleet, seen, number)
    shown = [worker_environment(plan, n, AROUND) for n in range(plan.workers)]
    gpu = [e["CUDA_VISIBLE_DEVICES"] for e in shown if e["PYTEST_GPUSHARE_ROLE"] == "gpu"]
    assert set(gpu) <= {device.uuid for device in named}
    assert all(e["CUDA_VISIBLE_DEVICES"] == "" for e in shown[len(gpu) :])
    promised: Counter[str] = Counter()
    for environment in shown[: len(gpu)]:
        promised[environment["CUDA_VISIBLE_DEVICES"]] += int(environment["PYTEST_GPUSHARE_SLOT"])
    for device in plan.devices:
        assert promised[device.device.uuid] <= device.budget
    assert shown == [worker_environment(plan, n, AROUND) for n in range(plan.workers)]


@given(st.integers(1, 16), st.integers(1, 64))
def test_slots_are_spread_evenly(devices: int, number: int) -> None:
    """On equal devices the numbers of workers differ by one at most, first come first."""
    fleet = tuple(
        Device(f"GPU-{n:02d}", "card", str(n), 96 * GB, 0, 96 * GB) for n in range(devices)
    )
    plan = planned(fleet, fleet, number)
    counts = Counter(slot.device.uuid for slot in plan.slots)
    assert max(counts.values()) - min(counts[device.uuid] for device in fleet) <= 1
    first = [slot.device.index for slot in plan.slots[: min(devices, number)]]
    assert first == sorted(first, key=int)


def test_devices_by_index() -> None:
    """For tools that break on UUIDs: the host's index, in the order in which NVML counts."""
    card = Device("GPU-9", "card", "3", 24 * GB, 0, 24 * GB)
    plan = planned((card,), (card,), 1)
    environment = worker_environment(plan, 0, AROUND._replace(by_index=True))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_mig_instances_go_by_uuid_always() -> None:
    """CUDA knows no index of a MIG instance."""
    part = Device("MIG-9", "part", "0.1", 10 * GB, 0, 10 * GB)
    plan = planned((part,), (part,), 1)
    environment = worker_environment(plan, 0, AROUND._replace(by_index=True))
    assert environment["CUDA_VISIBLE_DEVICES"] == "MIG-9"


def test_other_accelerators_go_by_their_own_variable() -> None:
    """A device that a hook added is shown by the variable that it names; CUDA shows none."""
    other = Device("HIP-0", "other", "0", 16 * GB, 0, 16 * GB, variable="HIP_VISIBLE_DEVICES")
    plan = planned((other,), (other,), 1)
    environment = worker_environment(plan, 0, AROUND)
    assert environment["HIP_VISIBLE_DEVICES"] == "HIP-0"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUPY_GPU_MEMORY_LIMIT" not in environment


def test_hooks_of_an_outer_run_are_undone() -> None:
    """A worker of a run inside a worker does not inherit the outer worker's caps by call."""
    around = AROUND._replace(outer={"PYTEST_GPUSHARE_TORCH_FRACTION": "0.5"})
    plan = planned((), (), 1)
    assert worker_environment(plan, 0, around)["PYTEST_GPUSHARE_TORCH_FRACTION"] == ""


def test_slot_of_an_outer_run() -> None:
    """Read only from what we write ourselves."""
    own = {"PYTEST_GPUSHARE_ROLE": "gpu", "PYTEST_GPUSHARE_SLOT": "1024"}
    assert slot_of_outer_run(own) == 1024
    for wrong in ({}, {**own, "PYTEST_GPUSHARE_SLOT": "1e9"}, {"PYTEST_GPUSHARE_SLOT": "1"}):
        assert slot_of_outer_run(wrong) is None
