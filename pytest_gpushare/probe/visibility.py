"""CUDA_VISIBLE_DEVICES, read as CUDA reads it. Pure: names in, positions out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gpushare.probe.facts import Device

VARIABLE = "CUDA_VISIBLE_DEVICES"
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Visible:
    """The devices that are left, in the order that CUDA gives them, and what was odd."""

    devices: tuple[Device, ...]
    problem: str = ""
    """What is wrong with the variable's value; CUDA says nothing about it."""
    absence: str = ""
    """Why no device is left, where none is."""


def visible(devices: Sequence[Device], value: str | None, order: str | None = None) -> Visible:
    """The devices that a process with this CUDA_VISIBLE_DEVICES sees.

    `value` None is an unset variable: all devices. `order` is CUDA_DEVICE_ORDER.
    An entry that names no device hides itself and all that follow, and a device that
    is named twice leaves none at all (CUDA Programming Guide, environment variables).
    """
    if value is None:
        return Visible(tuple(devices))
    if not value.strip():
        return Visible((), absence=f"{VARIABLE} is empty; unset it or name a device")
    found: list[Device] = []
    problem, written = "", f"{VARIABLE}={_short(value)}"
    for entry in value.split(","):
        device = _named(devices, entry.strip())
        if device is None:
            problem = (
                f'{written}: "{_short(entry.strip())}" names no device: it and what follows '
                "count for nothing"
            )
            break
        if device in found:
            twice = f"{written}: names {device.label} twice: CUDA then sees no device"
            return Visible((), twice, twice)
        found.append(device)
    if not found:
        return Visible((), "", problem)
    if not problem and _order_matters(devices, value, order):
        problem = (
            f"{written}: counts in CUDA's own order of devices, which NVML does not know; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID or name UUIDs"
        )
    return Visible(tuple(found), problem)


def _named(devices: Sequence[Device], entry: str) -> Device | None:
    if _INTEGER.fullmatch(entry):
        # CUDA counts whole GPUs by integers; MIG instances only go by name.
        # Compared as text: Python converts no integer of more than 4300 digits.
        index = entry.removeprefix("+").lstrip("0") or "0"
        return next((d for d in devices if d.index == index), None)
    if not entry.upper().startswith(("GPU-", "MIG-")) or len(entry) < 5:
        return None
    matches = [device for device in devices if device.uuid.lower().startswith(entry.lower())]
    return matches[0] if len(matches) == 1 else None


def _short(text: str) -> str:
    """A piece of the environment, fit for one line of a message."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _order_matters(devices: Sequence[Device], value: str, order: str | None) -> bool:
    """Whether integers may mean other devices to CUDA (fastest first) than to NVML."""
    integers = any(_INTEGER.fullmatch(entry.strip()) for entry in value.split(","))
    return integers and order != "PCI_BUS_ID" and len({device.name for device in devices}) > 1
