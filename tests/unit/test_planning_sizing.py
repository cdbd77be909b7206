"""The sizing rule as arithmetic: worked numbers, limits, and what must hold for all inputs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.config.kinds import read
from pytest_gpushare.config.options import OPTIONS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuFacts, GpuProcess, HostFacts
from pytest_gpushare.neighbours import NeighbourShare, resident_bytes
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.planning.plan import LeasedByOthers, Limit, Plan, Request
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.units import GB, MB

DEFAULTS = Settings(**{option.attribute: read(option, option.default, "") for option in OPTIONS})  # type: ignore[arg-type]
SILENT = OllamaFacts(asked=True)


def device(free: float, total: float = 24, index: int = 0, **more: Any) -> Device:
    """A device with so many GB free."""
    free_bytes, total_bytes = int(free * GB), int(total * GB)
    return Device(
        f"GPU-{index:04d}",
        "card",
        str(index),
        total_bytes,
        total_bytes - free_bytes,
        free_bytes,
        **more,
    )


def plan(
    *devices: Device,
    ollama: OllamaFacts = SILENT,
    request: Request = Request(),  # noqa: B008 - frozen
    cpus: int = 64,
    ram: int | None = None,
    sizes: KnownSizes = NOTHING_KNOWN,
    **settings: Any,
) -> Plan:
    """The plan for these devices, the rest at its default."""
    facts = GpuFacts(devices, devices, absence="" if devices else "NVML finds no device")
    host = HostFacts(cpus, ram)
    return plan_run(DEFAULTS._replace(**settings), facts, {OLLAMA: ollama}, host, request, sizes)


def slots(result: Plan) -> list[tuple[str, float]]:
    """(index of the device, GB) of each slot."""
    return [(slot.device.index, round(slot.vram / GB, 2)) for slot in result.slots]


def holding(size: float) -> OllamaFacts:
    """A server on this host whose model holds so many GB."""
    loaded = LoadedModel("qwen2.5:14b", int(size * GB), int(size * GB))
    return OllamaFacts(asked=True, answered=True, models=(loaded,))


def test_headline() -> None:
    """24 GB, 22 GB free: two workers of 4.5 GB, decided by the scale."""
    result = plan(device(22))
    assert slots(result) == [("0", 4.5), ("0", 4.5)]
    assert result.limited_by == (Limit.BY_SCALE,)


def test_resident_is_not_reserved_twice() -> None:
    """With its model loaded Ollama needs 1.2 GB more, not 12 GB more."""
    result = plan(device(11.2), ollama=holding(10.8))
    assert slots(result) == [("0", 4.5), ("0", 4.5)]
    assert round(result.devices[0].outstanding / GB, 2) == 1.2


def test_remote_ollama_holds_nothing_here() -> None:
    """A server on another machine is reserved for in full."""
    remote = holding(10.8)._replace(on_this_host=False)
    assert plan(device(11.2), ollama=remote).slots == ()


def test_resident_on_unknown_devices_is_counted_once() -> None:
    """While Ollama's device is unknown its bytes go to the fullest device, and only once."""
    result = plan(device(11.2), device(22, index=1), ollama=holding(10.8))
    assert [round(d.resident / GB, 1) for d in result.devices] == [10.8, 0.0]
    assert slots(result) == [("0", 4.5), ("1", 4.5), ("0", 4.5), ("1", 4.5)]


def test_process_list_tells_the_device() -> None:
    """A runner in NVML's list settles where the reservation is held, and how much is resident."""
    runner = GpuProcess(7, int(11 * GB), neighbour="Ollama")
    result = plan(device(23), device(12, index=1, processes=(runner,)), ollama=holding(10.8))
    assert [d.reservation // GB for d in result.devices] == [0, 12]
    assert [d.resident // GB for d in result.devices] == [0, 11]


def test_process_list_without_an_answer() -> None:
    """With detection off, the process list alone tells what is resident."""
    runner = GpuProcess(7, int(10 * GB), neighbour="Ollama")
    result = plan(device(12, processes=(runner,)), ollama=OllamaFacts())
    assert result.devices[0].outstanding == 2 * GB


def test_ollama_gpu_by_index_uuid_and_none() -> None:
    """The setting decides where the reservation is held."""
    pair = device(23), device(23, index=1)
    assert [s[1] for s in slots(plan(*pair, ollama_gpu=("0",)))] == [5.0, 11.0, 5.0, 11.0]
    assert [s[1] for s in slots(plan(*pair, ollama_gpu=("GPU-0001",)))] == [11.0, 5.0, 11.0, 5.0]
    assert [s[1] for s in slots(plan(*pair, ollama_gpu=("none",)))] == [11.0] * 4


def test_ollama_gpu_that_is_not_there() -> None:
    """A device that this machine lacks is an error that tells which there are."""
    with pytest.raises(
        SettingsError, match=r"gpu_share_ollama_gpu = 3: .*allowed is 0 \(GPU-0000\)"
    ):
        plan(device(22), ollama_gpu=("3",))


def test_exact_decimals() -> None:
    """100 GB × 0.29 workers per GB is 29 workers; binary floats make it 28."""
    result = plan(
        device(101, total=120),
        ollama_vram_reservation=Fraction(0),
        max_workers_per_gb=Fraction(29, 100),
        max_workers_per_gpu=0,
    )
    assert result.devices[0].by_scale == 29


@pytest.mark.parametrize(
    ("request_", "expected", "limit"),
    [
        (Request(number=1), [("0", 9.0)], Limit.NUMBER),
        (Request(number=2), [("0", 4.5), ("0", 4.5)], Limit.BY_SCALE),
        (Request(maxprocesses=1), [("0", 9.0)], Limit.MAXPROCESSES),
        (Request(number=1, maxprocesses=1), [("0", 9.0)], Limit.NUMBER),
    ],
)
def test_limits_of_the_run(
    request_: Request, expected: list[tuple[str, float]], limit: Limit
) -> None:
    """Fewer workers share the same budget; what decided is named, ties in the stated order."""
    result = plan(device(22), request=request_)
    assert (slots(result), result.limited_by) == (expected, (limit,))


def test_cpus_and_ram_limit() -> None:
    """Without a number the CPUs count, and RAM where a worker's need is told."""
    assert plan(device(22), cpus=1).limited_by == (Limit.CPUS,)
    by_ram = plan(device(22), ram=7 * GB, ram_per_worker=Fraction(4 * GB))
    assert (len(by_ram.slots), by_ram.limited_by) == (1, (Limit.RAM,))
    assert len(plan(device(22), cpus=1, request=Request(number=2)).slots) == 2


def test_what_left_no_gpu_worker() -> None:
    """The need, or the compute mode; nothing where there is no device."""
    barred = replace(device(22), compute_mode=ComputeMode.PROHIBITED)
    assert plan(device(14)).limited_by == (Limit.BY_NEED,)
    assert plan(barred).limited_by == (Limit.BY_MODE,)
    assert plan().limited_by == ()


def test_slots_leave_evenly_the_smallest_first() -> None:
    """Of 2 × 5.0 and 2 × 11.0 GB, three are 1 × 10.0 and 2 × 11.0; two are one on each device."""
    pair = device(23), device(23, index=1)
    three = plan(*pair, ollama_gpu=("0",), request=Request(number=3))
    assert sorted(slots(three)) == [("0", 10.0), ("1", 11.0), ("1", 11.0)]
    two = plan(*pair, ollama_gpu=("0",), request=Request(number=2))
    assert sorted(slots(two)) == [("0", 10.0), ("1", 22.0)]


def test_fallback_counts() -> None:
    """No room: N CPU workers if given, else xdist's auto, never more than --maxprocesses."""
    assert plan(cpus=8).cpu_workers == 8
    assert plan(request=Request(number=3)).cpu_workers == 3
    assert plan(request=Request(maxprocesses=2)).cpu_workers == 2
    assert plan(ram=4 * GB, ram_per_worker=Fraction(2 * GB)).cpu_workers == 2


@pytest.mark.parametrize(
    ("wanted", "request_", "cpus", "expected"),
    [
        (0, Request(), 8, (2, 0)),
        (4, Request(), 1, (1, 4)),
        (4, Request(), 8, (2, 4)),
        (None, Request(), 8, (2, 6)),
        (None, Request(), 2, (2, 1)),
        (None, Request(number=6), 8, (2, 4)),
        (None, Request(number=2), 8, (2, 0)),
        (4, Request(number=5), 8, (2, 3)),
        (4, Request(number=1), 8, (1, 0)),
        (4, Request(number=9), 8, (2, 4)),
        (4, Request(maxprocesses=3), 8, (2, 1)),
        (4, Request(in_process=True), 8, (1, 0)),
        (4, Request(number=5, fixed=True), 8, (2, 3)),
    ],
)
def test_cpu_workers_beside_gpu_workers(
    wanted: int | None, request_: Request, cpus: int, expected: tuple[int, int]
) -> None:
    """Those asked for, within -n and --maxprocesses; auto takes the CPUs that are left."""
    result = plan(device(22), cpus=cpus, request=request_, cpu_workers=wanted)
    assert (len(result.slots), result.cpu_workers) == expected


def test_cpu_workers_in_the_fallback_and_under_a_ram_limit() -> None:
    """Without a GPU worker the key is ignored; RAM is for both kinds."""
    assert plan(cpus=8, cpu_workers=2).cpu_workers == 8
    assert plan(request=Request(number=3), cpu_workers=None).cpu_workers == 3
    tight = plan(device(22), ram=6 * GB, ram_per_worker=Fraction(2 * GB), cpu_workers=4)
    assert (len(tight.slots), tight.cpu_workers) == (2, 1)


def test_in_process_takes_the_best_device() -> None:
    """-n 0: the process itself gets the whole budget of the device with most of it."""
    result = plan(device(18), device(22, index=1), request=Request(in_process=True))
    assert (slots(result), result.workers) == ([("1", 9.0)], 0)


SIZES = st.integers(0, 96 * 1024).map(lambda mb: mb * MB)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Device, ...]:
    """Up to 16 devices, any part of each in use."""
    devices = []
    for index in range(draw(st.integers(1, 16))):
        total = draw(st.integers(1, 96 * 1024)) * MB
        used = draw(st.integers(0, total))
        devices.append(Device(f"GPU-{index:04d}", "card", str(index), total, used, total - used))
    return tuple(devices)


SETTINGS = st.fixed_dictionaries(
    {
        "ollama_vram_reservation": SIZES.map(Fraction),
        "safety_buffer": st.integers(0, 4096).map(lambda mb: Fraction(mb * MB)),
        "max_workers_per_gb": st.fractions(0, 4),
        "min_vram_per_worker": st.fractions(1, 24).map(lambda gb: gb * GB),
        "max_workers_per_gpu": st.integers(0, 8),
        "ollama_gpu": st.sampled_from([("auto",), ("none",), ("0",)]),
        "cpu_workers": st.integers(0, 8) | st.none(),
    }
)
REQUESTS = st.builds(
    Request,
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.booleans(),
    fixed=st.just(False),
)


@given(fleets(), SETTINGS, REQUESTS, SIZES, st.integers(1, 64))
def test_what_always_holds(
    fleet: tuple[Device, ...], settings: dict[str, Any], request_: Request, held: int, cpus: int
) -> None:
    """Never over the budget, never under the minimum, never more than was asked for."""
    ollama = OllamaFacts(asked=True, answered=True, models=(LoadedModel("m", held, held),))
    result = plan(*fleet, ollama=ollama, request=request_, cpus=cpus, **settings)
    need = settings["min_vram_per_worker"]
    for planned in result.devices:
        mine = [slot for slot in result.slots if slot.device == planned.device]
        assert sum(slot.vram for slot in mine) <= planned.budget <= planned.device.free
        assert all(slot.vram >= int(need) for slot in mine)
        assert planned.budget == max(
            0, planned.device.free - planned.outstanding - planned.safety_buffer
        )
        if settings["max_workers_per_gpu"]:
            assert len(mine) <= settings["max_workers_per_gpu"]
    most = 1 if request_.in_process else min(request_.number or cpus, request_.maxprocesses or 999)
    assert len(result.slots) <= most
    if not request_.in_process:
        beside = settings["cpu_workers"]
        asked = [n for n in (request_.number, request_.maxprocesses) if n is not None]
        assert result.workers <= min(asked, default=result.workers)
        assert result.slots or result.cpu_workers == min(request_.number or cpus, *asked, 999)
        if result.slots and beside is not None:
            left = min(asked, default=999) - len(result.slots)
            assert result.cpu_workers == min(beside, left)
        elif result.slots and not asked:
            assert result.cpu_workers == max(1, cpus - len(result.slots))
    assert result == plan(*fleet, ollama=ollama, request=request_, cpus=cpus, **settings)


@given(fleets(), SETTINGS, REQUESTS, st.data())
def test_more_free_vram_never_means_fewer_workers(
    fleet: tuple[Device, ...], settings: dict[str, Any], request_: Request, data: st.DataObject
) -> None:
    """Freeing VRAM on any device keeps or raises the number of GPU workers."""
    at = data.draw(st.integers(0, len(fleet) - 1))
    freed = data.draw(st.integers(0, fleet[at].used))
    changed = replace(fleet[at], free=fleet[at].free + freed, used=fleet[at].used - freed)
    before = plan(*fleet, request=request_, **settings)
    after = plan(*fleet[:at], changed, *fleet[at + 1 :], request=request_, **settings)
    assert len(after.slots) >= len(before.slots)


@given(fleets(), SIZES, st.booleans(), st.data())
def test_what_is_resident_is_never_counted_twice(
    fleet: tuple[Device, ...], held: int, known: bool, data: st.DataObject
) -> None:
    """Over all devices no more is resident than Ollama holds, and on none more than is used."""
    told = data.draw(st.integers(0, fleet[0].used))
    runner = GpuProcess(1, told or None, neighbour="Ollama")
    fleet = (replace(fleet[0], processes=(runner,)), *fleet[1:]) if known else fleet
    facts = GpuFacts(fleet, fleet)
    ollama = OllamaFacts(asked=True, answered=True, models=(LoadedModel("m", held, held),))
    resident = resident_bytes(OLLAMA, ollama, fleet[:1] if known else None, facts)
    assert sum(resident.values()) <= max(held, told if known else 0)
    for one in fleet:
        assert 0 <= resident.get(one.uuid, 0) <= one.used


def test_millions_of_slots_are_trimmed_at_once() -> None:
    """A smallest need of 1 MB on a huge device is a plan like any other."""
    tiny = {"min_vram_per_worker": Fraction(MB), "max_workers_per_gb": Fraction(0)}
    pair = device(90_000, total=100_000), device(80_000, total=100_000, index=1)
    result = plan(*pair, request=Request(number=3), max_workers_per_gpu=0, **tiny)
    assert [slot.device.index for slot in result.slots] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("presets", "free", "number", "workers", "assumed"),
    [
        # Conservative would give 2 workers of 4.5 GB.
        ("packed", 22, 8, 8, 4.5),
        ("no-ollama, packed", 22, 16, 16, 3.0),
        ("aggressive, packed", 22, 8, 8, round(10 / 3, 2)),
        # A later preset wins: nothing is packed.
        ("packed, aggressive", 22, 8, 3, 0),
        ("conservative", 22, 8, 2, 0),
        # The other preset would give no worker: the device's budget.
        ("packed", 15, 8, 2, 2.0),
        # One worker has the budget to itself.
        ("packed", 22, 1, 1, 9.0),
    ],
)
def test_an_unknown_need_is_no_small_need(
    presets: str, free: int, number: int, workers: int, assumed: float
) -> None:
    """Under preset packed a test of unknown need counts as the slot of the other presets."""
    here = Path.cwd()
    settings = load(Written({}, {}, {"gpu_share_preset": presets}, "ini", here, here, here))
    gpus = GpuFacts((device(free),), (device(free),))
    result = plan_run(settings, gpus, {OLLAMA: SILENT}, HostFacts(64), Request(number))
    assert len(result.slots) == workers
    assert {round(slot.assumed_need / GB, 2) for slot in result.slots} == {assumed}
    (slot, *_) = result.slots
    assert slot.unknown_need == (slot.assumed_need or slot.vram)


def test_an_unknown_need_beside_leases() -> None:
    """It counts as the slot of the other presets in what other sessions leave."""
    here = Path.cwd()
    settings = load(Written({}, {}, {"gpu_share_preset": "packed"}, "ini", here, here, here))
    gpus = GpuFacts((device(22),), (device(22),))
    leased = LeasedByOthers({gpus.devices[0].uuid: 4 * GB})
    result = plan_run(settings, gpus, {OLLAMA: SILENT}, HostFacts(64), Request(8), others=leased)
    # Conservative would give 1 worker of 5 GB, and without the lease 2.
    assert {slot.assumed_need for slot in result.slots} == {5 * GB}


def test_two_neighbours() -> None:
    """Each has its reservation, and what one holds beyond its own is not the other's."""
    gpus = GpuFacts((device(20),), (device(20),))
    uuid = gpus.devices[0].uuid
    shares = [
        NeighbourShare("Ollama", {uuid: 4 * GB}, {uuid: 2 * GB}),
        NeighbourShare("another", {uuid: 3 * GB}, {uuid: 9 * GB}),
    ]
    (found,) = make_plan(DEFAULTS, gpus, shares, HostFacts(8), Request()).devices
    assert (found.reservation, found.resident, found.outstanding) == (7 * GB, 5 * GB, 2 * GB)
    assert found.budget == 17 * GB
