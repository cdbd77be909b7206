"""The plan as a document, in the words of the report's schema; sizes in bytes, unknown is null."""

from __future__ import annotations

from typing import Any

from pytest_gpushare import __version__
from pytest_gpushare.plan.model import DevicePlan, Plan
from pytest_gpushare.plan.shortage import shortage
from pytest_gpushare.probe.facts import OllamaFacts
from pytest_gpushare.report.clean import cleaned, cleaner
from pytest_gpushare.report.in_force import in_force
from pytest_gpushare.report.terminal import header
from pytest_gpushare.run.placement import Surroundings, caps_of
from pytest_gpushare.run.started import LeftAlone, Started

SCHEMA = 1


def generator() -> dict[str, str]:
    """Who wrote the document."""
    return {"name": "pytest-gpushare", "version": __version__}


def plan_document(started: Started | LeftAlone) -> dict[str, Any]:
    """What `plan --json` prints."""
    document: dict[str, Any] = cleaned(_plan_document(started), cleaner())
    return document


def _plan_document(started: Started | LeftAlone) -> dict[str, Any]:
    lines = [line.text for line in header(started, 0)]
    head = {"schema": SCHEMA, "generator": generator()}
    if isinstance(started, LeftAlone):
        return {**head, "plan": None, "devices": [], "workers": [], "ollama": None,
                "problems": [started.why], "lines": lines}  # fmt: skip
    plan = started.plan
    return {
        **head,
        "simulated": started.gpus.simulated,
        "driver": started.gpus.driver,
        "plan": {
            "gpu_workers": len(plan.slots),
            "cpu_workers": plan.cpu_workers,
            "in_process": plan.request.in_process,
            "limited_by": [limit.value for limit in plan.limited_by],
            "limits": {limit.value: most for limit, most in plan.limits},
            "presets": list(started.settings.presets),
            "absence": plan.absence,
            "shortage": "" if plan.slots else shortage(plan),
            "needed_bytes": plan.needed,
            "ollama_needs": None if plan.demand is None else plan.demand.document(),
            "settings": in_force(started.settings),
        },
        "devices": [_device(device) for device in plan.devices],
        "workers": _workers(plan, started.around),
        "ollama": ollama_document(started.ollama),
        "problems": list(started.notes),
        "lines": lines,
    }


def ollama_document(ollama: OllamaFacts) -> dict[str, Any] | None:
    """What the server said; None where nobody was asked."""
    if not ollama.asked:
        return None
    return {
        "address": ollama.address,
        "version": ollama.version,
        "found_by": ollama.found_by,
        "answered": ollama.answered,
        "on_this_host": ollama.on_this_host,
        "problem": ollama.problem,
        "models": [
            {
                "name": model.name,
                "size_bytes": model.size,
                "size_vram_bytes": model.size_vram,
                "spilled": model.size_vram < model.size,
            }
            for model in ollama.models
        ],
    }


def _device(planned: DevicePlan) -> dict[str, Any]:
    device = planned.device
    return {
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "total_bytes": device.total,
        "used_bytes": device.used,
        "free_bytes": device.free,
        "unified": device.unified,
        "reservation_bytes": planned.reservation,
        "resident_bytes": planned.resident,
        "outstanding_bytes": planned.outstanding,
        "safety_buffer_bytes": planned.safety_buffer,
        "budget_bytes": planned.budget,
        "workers": planned.workers,
        "slot_bytes": planned.slot_vram or None,
        "limited_by": planned.limited_by.value,
    }


def _workers(plan: Plan, around: Surroundings) -> list[dict[str, Any]]:
    gpu: list[dict[str, Any]] = [
        {
            "id": "this process" if plan.request.in_process else f"gw{number}",
            "role": "gpu",
            "device": slot.device.uuid,
            "slot_bytes": slot.vram,
            "caps": list(caps_of(slot, around).told),
        }
        for number, slot in enumerate(plan.slots)
    ]
    cpu: list[dict[str, Any]] = [
        {"id": f"gw{number}", "role": "cpu", "device": None, "slot_bytes": None, "caps": []}
        for number in range(len(gpu), len(gpu) + plan.cpu_workers)
    ]
    return gpu + cpu
