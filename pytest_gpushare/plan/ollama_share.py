"""Where the reservation is held, and how much of it Ollama holds already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.probe.facts import Device, GpuFacts, OllamaFacts


def devices_of_ollama(setting: Sequence[str], gpus: GpuFacts) -> tuple[Device, ...] | None:
    """The devices that Ollama uses; None while that is unknown, () where it uses none.

    The setting decides; under `auto` the devices on which NVML lists one of its processes.
    Raises `SettingsError` for a name that is no device of this host.
    """
    if tuple(setting) == ("none",):
        return ()
    if tuple(setting) != ("auto",):
        return tuple(_named(name, gpus.all_devices) for name in setting if gpus.all_devices)
    found = tuple(d for d in gpus.all_devices if any(p.is_ollama for p in d.processes or ()))
    return found or (gpus.all_devices if len(gpus.all_devices) == 1 else None)


def resident_bytes(
    known: Sequence[Device] | None, gpus: GpuFacts, ollama: OllamaFacts
) -> Mapping[str, int]:
    """UUID -> bytes that Ollama holds there; no byte is counted on two devices.

    NVML's figure for its processes is the best one, as `/api/ps` leaves out contexts and
    pools. Where NVML does not tell, what the server says is laid on the devices that it
    uses, the fullest first (while they are unknown: on all), and never more than is in use.
    A server on another host holds nothing here.
    """
    if ollama.asked and not ollama.on_this_host:
        return {}
    candidates = gpus.all_devices if known is None else known
    told = {d.uuid: min(_by_process(d), d.used) for d in candidates if _by_process(d)}
    left = max(0, ollama.vram - sum(told.values())) if ollama.answered else 0
    result = dict(told)
    for device in sorted(candidates, key=lambda d: (-d.used, d.uuid)):
        more = min(left, device.used - result.get(device.uuid, 0))
        result[device.uuid] = result.get(device.uuid, 0) + more
        left -= more
    return result


def _by_process(device: Device) -> int:
    return sum(p.used or 0 for p in device.processes or () if p.is_ollama)


def _named(name: str, devices: Sequence[Device]) -> Device:
    matches = [
        device
        for device in devices
        if device.index == name
        or (not name.isdigit() and device.uuid.lower().startswith(name.lower()))
    ]
    if len(matches) != 1:
        known = ", ".join(f"{device.index} ({device.uuid})" for device in devices)
        fact = "names several devices" if matches else "names no device of this machine"
        raise SettingsError(
            f"gpu_share_ollama_gpu = {name}: {fact}: allowed is {known}, auto, none"
        )
    return matches[0]
