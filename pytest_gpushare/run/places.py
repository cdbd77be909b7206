"""The place of each worker, as it travels to it and as tests see it."""

from __future__ import annotations

from typing import Any

from pytest_gpushare.place import Place
from pytest_gpushare.plan.declared import means_cpu
from pytest_gpushare.plan.model import Plan
from pytest_gpushare.plan.shortage import shortage
from pytest_gpushare.run.placement import Surroundings, seen, visibility
from pytest_gpushare.settings.values import Settings

NUMBER = "PYTEST_GPUSHARE_NUMBER"
"""A worker's number in the plan: its replacement after a crash has another id, but this number."""


def place_of(plan: Plan, number: int) -> Place:
    """The place of the worker of this number, from 0."""
    told = {
        "gpu_workers": len(plan.slots),
        "cpu_workers": plan.cpu_workers,
        "limited_by": [limit.value for limit in plan.limited_by],
        "slots": [[slot.device.uuid, slot.vram] for slot in plan.slots],
    }
    if number >= len(plan.slots):
        return Place("cpu", plan=told)
    slot = plan.slots[number]
    device = slot.device
    return Place("gpu", device.uuid, device.name, device.index, slot.vram, told)


def message_to(plan: Plan, number: int, around: Surroundings) -> dict[str, Any]:
    """What a worker is told, in the builtin types that execnet carries."""
    slot = plan.slots[number] if number < len(plan.slots) else None
    own = {} if around.simulated else visibility(plan, slot.device if slot else None, around)
    return {"place": vars(place_of(plan, number)), "visible": own}


def message_of_tests(settings: Settings, plan: Plan, around: Surroundings) -> dict[str, Any]:
    """What a worker must know to tell which of its tests are GPU tests."""
    return {
        "marker": settings.marker,
        "aliases": [tuple(alias) for alias in settings.markers],
        "rules": [tuple(rule) for rule in settings.vram],
        "gpu_unless_marked": means_cpu(settings.markers),
        "without_gpu": settings.without_gpu,
        "absence": "" if plan.slots else shortage(plan),
        "budget": plan.usable,
        "devices": len(seen(plan, plan.slots[0].device, around)) if plan.slots else 0,
    }
