"""The sizing rule: from facts and settings to a plan, in exact arithmetic.

Per device: budget = max(0, free - outstanding reservation - safety buffer), divided by
need, by scale and by cap; over all devices: limited by xdist's options, by RAM, and
by CPUs where no number was given. What neighbours hold already is not reserved a second time.
`docs/explanation/sizing.md` explains the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from pytest_gpushare.config.kinds import read
from pytest_gpushare.config.options import BY_KEY, PRESETS, merged
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuFacts, HostFacts
from pytest_gpushare.neighbours import NeighbourShare
from pytest_gpushare.planning.plan import DevicePlan, DeviceShare, Limit, Plan, Request, Slot
from pytest_gpushare.units import GB


def make_plan(
    settings: Settings,
    gpus: GpuFacts,
    neighbours: Sequence[NeighbourShare],
    host: HostFacts,
    request: Request,
    leases: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """The plan for this run. Same input, same plan.

    `leases` are those of other sessions: UUID -> bytes that they have not yet taken.
    """
    devices = [
        size_device(
            device,
            settings,
            [_share_on(device, each) for each in neighbours],
            most=host.outer_slot,
            leases=leases.get(device.uuid, 0),
        )
        for device in gpus.devices
    ]
    ram_limit = _ram_limit(settings, host)
    if request.in_process:
        devices = _keep_best(devices)
        limits: tuple[tuple[Limit, int], ...] = ()
        cpu_workers = 0
        decided: tuple[Limit, ...] = (Limit.IN_PROCESS,)
    else:
        limits = _limits(request, ram_limit, host)
        before = sum(device.workers for device in devices)
        devices = _trim(devices, min((most for _, most in limits), default=before))
        after = sum(device.workers for device in devices)
        decided = _deciding(devices, limits, before, after)
        cpu_workers = _cpu_workers(after, settings.cpu_workers, request, ram_limit, host)
    return Plan(
        slots=_deal(devices),
        cpu_workers=cpu_workers,
        limited_by=decided,
        devices=tuple(devices),
        limits=limits,
        request=request,
        absence="" if gpus.devices else gpus.absence,
        needed=-(-settings.min_vram_per_worker // 1),
        demand=next((each.demand for each in neighbours if each.demand), None),
        is_released=any(each.is_released for each in neighbours),
    )


def _share_on(device: Device, neighbour: NeighbourShare) -> DeviceShare:
    """What of a device is a neighbour's: what it holds beyond its reservation is no other's."""
    kept = neighbour.reservation.get(device.uuid, 0)
    return DeviceShare(neighbour.name, kept, min(kept, neighbour.resident.get(device.uuid, 0)))


def size_device(
    device: Device,
    settings: Settings,
    shares: Sequence[DeviceShare],
    *,
    most: int | None = None,
    leases: int = 0,
) -> DevicePlan:
    """How many workers fit on one device, and which figure decides; no limit of the run yet.

    `shares`: what is kept for neighbours there. `most` bounds the budget of a run that lives in a
    slot of another one, `leases` are those of other sessions, in bytes.
    """
    reservation = sum(each.reservation for each in shares)
    resident = sum(each.resident for each in shares)
    safety = int(settings.safety_buffer)
    outstanding = max(0, reservation - resident)
    budget = max(0, device.free - outstanding - safety - leases)
    budget = budget if most is None else min(budget, most)
    by_need = int(budget / settings.min_vram_per_worker)
    scale = settings.max_workers_per_gb
    by_scale = max(1, int(Fraction(budget, GB) * scale)) if scale else None
    by_cap = settings.max_workers_per_gpu or None
    by_mode = _by_compute_mode(device)
    figures = [
        (Limit.BY_NEED, by_need),
        (Limit.BY_SCALE, by_scale),
        (Limit.BY_CAP, by_cap),
        (Limit.BY_MODE, by_mode),
    ]
    limit, fitting = _smallest([(name, most) for name, most in figures if most is not None])
    plain, assumed = _without_packed(settings), 0
    if plain is not settings:
        other = size_device(device, plain, shares, most=most, leases=leases)
        assumed = budget // max(1, other.fitting)
    return DevicePlan(
        device=device,
        reservation=reservation,
        resident=resident,
        outstanding=outstanding,
        safety_buffer=safety,
        most=most,
        budget=budget,
        by_need=by_need,
        by_scale=by_scale,
        by_cap=by_cap,
        by_mode=by_mode,
        fitting=fitting,
        limited_by=limit,
        workers=fitting,
        assumed_need=assumed,
        leases=leases,
        shares=tuple(shares),
    )


def _without_packed(settings: Settings) -> Settings:
    """The settings as the other presets have them, the default one below them."""
    if _PACKED not in settings.presets:
        return settings
    values = merged(["conservative", *(name for name in settings.presets if name != _PACKED)])
    changed: dict[str, Any] = {}
    for key, text in PRESETS[_PACKED].items():
        option, origin = BY_KEY[key], f"preset {_PACKED}"
        # A value that was changed since the settings were read is the user's, too.
        is_packed = getattr(settings, option.attribute) == read(option, text, origin)
        if settings.origins.get(key) == origin and is_packed:
            raw, name = values[key]
            changed[option.attribute] = read(option, raw, f"preset {name}")
    if not changed:
        return settings
    presets = tuple(name for name in settings.presets if name != _PACKED)
    return settings._replace(**changed, presets=presets)


_PACKED = "packed"


def _smallest(figures: Sequence[tuple[Limit, int]]) -> tuple[Limit, int]:
    """The figure that decides; of equal ones the first, as `Limit` orders them."""
    return min(figures, key=lambda figure: figure[1])


def _by_compute_mode(device: Device) -> int | None:
    """Processes that the compute mode lets in besides those that hold a context there now."""
    if device.compute_mode is ComputeMode.DEFAULT:
        return None
    return int(device.compute_mode is ComputeMode.EXCLUSIVE and not device.processes)


def _ram_limit(settings: Settings, host: HostFacts) -> int | None:
    if not settings.ram_per_worker or host.available_ram is None:
        return None
    # A run needs at least one worker, also where its RAM may not suffice.
    return max(1, int(host.available_ram / settings.ram_per_worker))


def _limits(
    request: Request, ram_limit: int | None, host: HostFacts
) -> tuple[tuple[Limit, int], ...]:
    found = [
        (Limit.NUMBER, request.number),
        (Limit.MAXPROCESSES, request.maxprocesses or None),
        (Limit.RAM, ram_limit),
        (Limit.CPUS, max(1, host.cpus) if request.number is None else None),
    ]
    return tuple((name, most) for name, most in found if most is not None)


def _trim(devices: Sequence[DevicePlan], most: int) -> list[DevicePlan]:
    """Take slots away evenly, the smallest first, until `most` are left.

    Each time from a device with the most slots; of those from the one whose slots are
    smallest, since its remaining workers gain most. Equal ones go by UUID, last first.
    """
    # Cut to `most` per device first: millions of tiny slots would be removed one by one.
    left = [replace(device, workers=min(device.workers, most)) for device in devices]
    for _ in range(sum(device.workers for device in left) - most):
        at = max(
            range(len(left)),
            key=lambda i: (left[i].workers, -left[i].slot_vram, left[i].device.uuid),
        )
        left[at] = replace(left[at], workers=left[at].workers - 1)
    return left


def _keep_best(devices: Sequence[DevicePlan]) -> list[DevicePlan]:
    """One slot on the device with the largest budget; none where none fits."""
    fitting = [device for device in devices if device.fitting]
    best = min(fitting, key=lambda d: (-d.budget, d.device.uuid), default=None)
    return [replace(device, workers=int(device is best)) for device in devices]


def _deciding(
    devices: Sequence[DevicePlan],
    limits: Sequence[tuple[Limit, int]],
    before: int,
    after: int,
) -> tuple[Limit, ...]:
    if after < before:
        return (_smallest(limits)[0],)
    deciding = [device for device in devices if device.workers] or devices
    return tuple(sorted({device.limited_by for device in deciding}, key=list(Limit).index))


def _cpu_workers(
    gpu_workers: int,
    wanted: int | None,
    request: Request,
    ram_limit: int | None,
    host: HostFacts,
) -> int:
    """Workers without a slot: with GPU workers those asked for, else the fall-back's."""
    if request.fixed and request.number is not None:
        return request.number - gpu_workers
    number = request.number if request.number is not None else max(1, host.cpus)
    if not gpu_workers:
        wanted = number
    elif wanted is None:
        wanted = max(1, number - gpu_workers)
    bounds = [b for b in (request.number, request.maxprocesses or None, ram_limit) if b is not None]
    return min([wanted, *(max(0, bound - gpu_workers) for bound in bounds)])


def _deal(devices: Sequence[DevicePlan]) -> tuple[Slot, ...]:
    """The slots, one of each device in turn, so that the first workers lie on all devices."""
    rounds = max((device.workers for device in devices), default=0)
    return tuple(
        Slot(
            device.device,
            device.slot_vram,
            max(device.assumed_need, device.slot_vram) if device.assumed_need else 0,
        )
        for turn in range(rounds)
        for device in devices
        if turn < device.workers
    )
