"""The place of each worker, as it travels to it and as tests see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gpushare.place import Place
from pytest_gpushare.plan.model import Plan
from pytest_gpushare.run.placement import ORDER, Surroundings, worker_environment

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
    environment = worker_environment(plan, number, around)
    own = {name: text for name, text in environment.items() if _is_visibility(name)}
    return {"place": vars(place_of(plan, number)), "visible": own}


def place_from(message: Mapping[str, Any]) -> Place:
    """The place in a message, on the worker's side."""
    return Place(**message["place"])


def _is_visibility(name: str) -> bool:
    return name.endswith("VISIBLE_DEVICES") or name == ORDER
