"""What the plan left to Ollama, and what would have left it more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.plan.holding import Held
from pytest_gpushare.units import GB, MB

_STEP_MB = 500
_HALF_GB = GB // 2


class Promise(NamedTuple):
    """What the plan left to Ollama on the devices that it may use; bytes."""

    start: Mapping[str, Held]
    """UUID -> who held what when the plan was made."""
    budgets: Mapping[str, int]
    """UUID -> what the tests may hold."""
    reservation: int
    """What was kept for Ollama on each device."""
    safety_buffer: int
    needed: int
    """The smallest slot."""


class Setting(NamedTuple):
    """A setting with the value that would have prevented a spill."""

    key: str
    value: str
    is_without_workers: bool = False
    """Whether no GPU worker would have fitted any more."""


def larger_slots(largest: int, promise: Promise) -> Setting:
    """Slots as large as the largest worker was, so that fewer of them share the budget."""
    slot = -(-largest // _HALF_GB) * _HALF_GB
    return Setting(
        "min_vram_per_worker_gb",
        f"{slot / GB:g}",
        is_without_workers=slot > max(promise.budgets.values(), default=0),
    )


def larger_reservation(needed: int, promise: Promise) -> Setting | None:
    """The reservation that keeps so much, rounded up; None where no device has it."""
    megabytes = -(-needed // (_STEP_MB * MB)) * _STEP_MB
    kept = megabytes * MB
    rooms = [h.free + h.ollama for h in promise.start.values()]
    if needed > max(rooms, default=0):
        return None
    left = max(
        held.free - max(0, kept - held.ollama) - promise.safety_buffer
        for held in promise.start.values()
    )
    return Setting("ollama_vram_reservation_mb", str(megabytes), left < promise.needed)
