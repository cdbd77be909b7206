"""`--gpu-share-simulate`: a user's what-if in place of NVML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.probe.facts import Device, GpuFacts
from pytest_gpushare.units import parse_size

_USAGE = (
    "allowed is TOTAL[:used=SIZE][:name=NAME], for example 24GB:used=2GB; "
    "give the option again for a second device"
)
_MOST_DEVICES = 64


def simulated(specs: Sequence[str]) -> GpuFacts:
    """The devices that the texts describe. Raises `SettingsError` for what they cannot mean."""
    if len(specs) > _MOST_DEVICES:
        raise SettingsError(f"--gpu-share-simulate: {len(specs)} devices: at most {_MOST_DEVICES}")
    devices = tuple(_device(spec, index) for index, spec in enumerate(specs))
    return GpuFacts(devices, devices, simulated=True)


def _device(spec: str, index: int) -> Device:
    total_text, *rest = spec.split(":")
    given = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in ("used", "name") or key.strip() in given:
            raise _error(spec, f'"{part}" is not understood')
        given[key.strip()] = value.strip()
    total, used = _bytes(spec, total_text), _bytes(spec, given.get("used", "0"))
    if total == 0:
        raise _error(spec, "a device of 0 GB has no VRAM")
    if used > total:
        raise _error(spec, "more is used than there is")
    name = re.sub(r"[^\w .()+-]", "?", given.get("name") or "simulated GPU")[:80]
    return Device(f"GPU-simulated-{index:02d}", name, str(index), total, used, total - used)


def _bytes(spec: str, text: str) -> int:
    try:
        size = parse_size(text, "GB")
    except ValueError:
        raise _error(spec, f'"{text}" is no size') from None
    if size >= 2**50:
        raise _error(spec, f'"{text}" is more than any GPU has')
    return int(size)


def _error(spec: str, fact: str) -> SettingsError:
    return SettingsError(f"--gpu-share-simulate {spec[:80]}: {fact}: {_USAGE}")
