"""GPUs of AMD, which NVML does not know, and a last word on the size of the slots."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpushare.plan.model import Plan
from pytest_gpushare.probe.facts import Device

VARIABLE = "ROCR_VISIBLE_DEVICES"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("amd_sysfs", "where Linux lists its graphics devices", default="/sys/class/drm")
    parser.addini("most_vram_gb", "more than this no worker gets, in GB", default="")


def pytest_gpushare_devices(config: pytest.Config) -> list[Device]:
    cards = Path(config.getini("amd_sysfs")).glob("card*/device/mem_info_vram_total")
    found = [_device(path.parent) for path in sorted(cards) if _is_card(path.parents[1].name)]
    # What a scheduler or a container shows this run bounds the plan.
    shown = os.environ.get(VARIABLE)
    return [device for device in found if shown is None or device.uuid in shown.split(",")]


def pytest_gpushare_plan(config: pytest.Config, plan: Plan) -> Plan | None:
    most = config.getini("most_vram_gb")
    if not most:
        return None
    size = int(float(most) * 1024**3)
    return replace(
        plan, slots=tuple(replace(slot, vram=min(slot.vram, size)) for slot in plan.slots)
    )


def _device(folder: Path) -> Device:
    total, used = (_number(folder / f"mem_info_vram_{what}") for what in ("total", "used"))
    return Device(
        uuid=f"GPU-{_text(folder / 'unique_id')}",
        name=_text(folder / "product_name") or f"AMD GPU {_text(folder / 'device')}",
        index=folder.parent.name,
        total=total,
        used=used,
        free=total - used,
        variable=VARIABLE,
    )


def _is_card(name: str) -> bool:
    # Its connectors stand beside it, as card0-DP-1.
    return re.fullmatch(r"card\d+", name) is not None


def _number(path: Path) -> int:
    return int(_text(path) or 0)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
