"""Which device each worker sees and what caps it, as environment variables. Pure."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.vendors import variables, vendor_of
from pytest_gpushare.leases import AcquireTerms
from pytest_gpushare.place import Place
from pytest_gpushare.planning.caps import (
    CONTEXT_ALLOWANCE,
    TENSORFLOW_HOOK,
    TORCH_HOOK,
    Caps,
    caps_for,
    with_mark,
)
from pytest_gpushare.planning.plan import Plan, Slot, shortage
from pytest_gpushare.scheduler.needs import MARKER, means_cpu, only_one, uses_models

ROLE = "PYTEST_GPUSHARE_ROLE"
"""`gpu` or `cpu`: what a worker is; set in its environment before its first import."""

SLOT = "PYTEST_GPUSHARE_SLOT"
"""Bytes of VRAM of a GPU worker's slot, for runs that its tests start."""

NO_DEVICE = "-1" if sys.platform == "win32" else ""
"""What shows no device. Windows knows no empty variables: an empty one would show all."""


class PlacementContext(NamedTuple):
    """What of the world outside decides on the workers' environments."""

    outer: Mapping[str, str]
    """The environment that workers inherit."""
    versions: Mapping[str, str] = {}
    """The frameworks that are installed; empty where nothing is to be capped."""
    mps: bool = False
    """Whether the daemon of CUDA MPS runs."""
    cap_vram: bool = True
    by_index: bool = False
    """Devices by index, where their vendor has a numbering that all processes share."""
    see_all: bool = False
    """Whether a GPU worker sees the other devices too, after its own."""
    simulated: bool = False
    """A what-if names devices that do not exist: no visibility, no caps."""
    contexts: Mapping[str, int] = {}
    """Device name -> bytes of a CUDA context, where that was measured."""
    budgets: Mapping[str, int] = {}
    """UUID -> the device's budget in bytes, where tests have needs of their own; else empty."""

    def context_on(self, name: str | None) -> int:
        """Bytes of a CUDA context on devices of that name: measured by earlier runs, or assumed."""
        return self.contexts.get(name or "", CONTEXT_ALLOWANCE)


def worker_environment(plan: Plan, number: int, placement: PlacementContext) -> dict[str, str]:
    """The variables for the worker of this number, from 0: GPU workers first, then CPU workers.

    A GPU worker sees its device, alone or first; a CPU worker sees none.
    """
    slot = plan.slots[number] if number < len(plan.slots) else None
    # Variables of an outer run must not reach a worker of this one: empty ones undo them.
    environment = {name: "" for name in (TORCH_HOOK, TENSORFLOW_HOOK) if name in placement.outer}
    if slot is None:
        environment.update({ROLE: "cpu", SLOT: "0"})
    else:
        environment.update({ROLE: "gpu", SLOT: str(slot.vram)})
        environment.update(with_mark(caps_of(slot, placement).environment))
    if not placement.simulated:
        environment.update(visibility(plan, slot.device if slot else None, placement))
    return environment


def caps_of(slot: Slot, placement: PlacementContext) -> Caps:
    """What caps the frameworks of a worker in this slot, where anything does."""
    vendor = vendor_of(slot.device)
    if not placement.cap_vram or placement.simulated or vendor is None:
        return Caps()
    return caps_for(
        slot,
        placement.outer,
        placement.versions,
        rules=vendor.caps,
        context=placement.context_on(slot.device.name),
        mps=placement.mps,
        budget=placement.budgets.get(slot.device.uuid),
    )


def slot_of_outer_run(environment: Mapping[str, str]) -> int | None:
    """Bytes that a run inside a GPU worker may share out: its slot; None outside of one."""
    text = environment.get(SLOT, "")
    if environment.get(ROLE) != "gpu" or not re.fullmatch("[0-9]{1,18}", text):
        return None
    return int(text)


def visibility(plan: Plan, device: Device | None, placement: PlacementContext) -> dict[str, str]:
    """The variables that show a worker what it is to see, and hide all others from it:
    `CUDA_VISIBLE_DEVICES`, and those of other vendors."""
    # A worker that is given one kind of accelerator sees none of the others.
    hidden = dict.fromkeys([*variables(), *(d.device.variable for d in plan.devices)], NO_DEVICE)
    if device is None:
        return hidden
    devices = seen(plan, device, placement)
    vendor = vendor_of(device) if placement.by_index else None
    # MIG instances have no index that CUDA knows.
    if vendor is not None and vendor.numbering is not None and not _is_instance(device):
        return {
            **hidden,
            device.variable: ",".join(d.index for d in devices),
            vendor.numbering[0]: vendor.numbering[1],
        }
    return {**hidden, device.variable: ",".join(d.selector for d in devices)}


def seen(plan: Plan, device: Device, placement: PlacementContext) -> tuple[Device, ...]:
    """What a worker on this device sees: its own device first, the others only if they may be."""
    # A process of CUDA can use one MIG instance, and no GPU besides it.
    if not placement.see_all or _is_instance(device):
        return (device,)
    others = (planned.device for planned in plan.devices)
    return (
        device,
        *(
            other
            for other in others
            if other != device and other.variable == device.variable and not _is_instance(other)
        ),
    )


def _is_instance(device: Device) -> bool:
    return "." in device.index


NUMBER = "PYTEST_GPUSHARE_NUMBER"
"""A worker's number in the plan: its replacement after a crash has another id, but this number."""


def place_of(plan: Plan, number: int) -> Place:
    """The place of the worker of this number, from 0."""
    document = {
        "gpu_workers": len(plan.slots),
        "cpu_workers": plan.cpu_workers,
        "limited_by": [limit.value for limit in plan.limited_by],
        "slots": [[slot.device.uuid, slot.vram] for slot in plan.slots],
    }
    if number >= len(plan.slots):
        return Place("cpu", plan=document)
    slot = plan.slots[number]
    device = slot.device
    return Place("gpu", device.uuid, device.name, device.index, slot.vram, document)


def worker_message(
    settings: Settings,
    plan: Plan,
    number: int,
    placement: PlacementContext,
    *,
    ollama_url: str,
    lease: str,
) -> dict[str, Any]:
    """All that the worker of this number is sent when it starts, in builtin types.

    `ollama_url` is where tests find the server, and `lease` the path of the record that the worker
    keeps alive.
    """
    slot = plan.slots[number] if number < len(plan.slots) else None
    own = {} if placement.simulated else visibility(plan, slot.device if slot else None, placement)
    place = place_of(plan, number)
    models = message_of_models(settings)
    models |= {"url": ollama_url, "dispatched": not plan.request.in_process}
    return {
        "place": vars(place),
        "visible": own,
        "memory": {
            "context": placement.context_on(place.name),
            "empty_caches": settings.empty_caches,
        },
        "tests": {**_message_of_tests(settings, plan, placement), "ollama": models},
        "lease": lease,
        "acquire": list(AcquireTerms.of(settings)),
    }


def _message_of_tests(
    settings: Settings, plan: Plan, placement: PlacementContext
) -> dict[str, Any]:
    """What a worker must know to find its GPU tests."""
    return {
        "marker": settings.marker,
        "aliases": [tuple(alias) for alias in settings.markers],
        "rules": [tuple(rule) for rule in settings.vram],
        "gpu_unless_marked": means_cpu(settings.markers),
        "without_gpu": settings.without_gpu,
        "absence": "" if plan.slots else shortage(plan),
        "budget": plan.usable,
        "devices": len(seen(plan, plan.slots[0].device, placement)) if plan.slots else 0,
    }


def message_of_models(settings: Settings) -> dict[str, Any]:
    """What a worker must know to find its tests that use models of Ollama's."""
    return {
        "rules": [tuple(rule) for rule in settings.ollama_tests],
        "param": settings.ollama_param,
        "only_model": only_one(settings.ollama_models),
        "without": settings.without_ollama,
        "markers": [MARKER, *(a.marker for a in settings.markers if uses_models(a))],
    }
