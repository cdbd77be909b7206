"""Why no GPU worker fits, in the words that header and errors share."""

from __future__ import annotations

from pytest_gpushare.plan.model import Limit, Plan
from pytest_gpushare.probe.facts import ComputeMode
from pytest_gpushare.units import format_gb

_MODES = {
    ComputeMode.PROHIBITED: "its compute mode PROHIBITED lets no process in",
    ComputeMode.EXCLUSIVE: "its compute mode EXCLUSIVE_PROCESS keeps others out while it is used",
}


def shortage(plan: Plan) -> str:
    """What a plan without slots lacks: devices, VRAM, or a device that lets a worker in."""
    if plan.absence:
        return f"no GPU: {plan.absence}"
    if plan.limited_by == (Limit.HOOK,):
        return f"{Limit.HOOK.value} left no GPU worker"
    barred = [planned.device for planned in plan.devices if planned.limited_by is Limit.BY_MODE]
    if len(barred) == len(plan.devices):
        return "; ".join(f"{device.label}: {_MODES[device.compute_mode]}" for device in barred)
    return (
        f"insufficient VRAM per worker: {format_gb(plan.usable)} usable, "
        f"{format_gb(plan.needed)} needed; gpu_share_min_vram_per_worker_gb"
    )
