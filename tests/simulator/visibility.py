"""Which devices CUDA shows to a process: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .hardware import DeviceState


def visible_devices(devices: Sequence[DeviceState], environ: Mapping[str, str]) -> list[str]:
    """Return the UUIDs that CUDA enumerates, its device 0 first.

    As the driver does: an entry that names no device hides itself and all after it, a
    device named twice hides all, and a MIG instance is shown alone: either the first
    entry is one, or none is shown.
    """
    gpus = [device for device in devices if device.parent is None]
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # FASTEST_FIRST, the default; the driver's measure of "fast" is not documented.
        gpus.sort(key=lambda gpu: (gpu.capability, gpu.total), reverse=True)
    value = environ.get("CUDA_VISIBLE_DEVICES")
    entries = [str(i) for i in range(len(gpus))] if value is None else value.split(",")
    found: list[DeviceState] = []
    for entry in entries:
        device = _resolve(entry.strip(), gpus, devices)
        if device is None:
            break
        found.append(device)
    if len({device.uuid for device in found}) != len(found):
        return []
    if found and found[0].parent is not None:
        return [found[0].uuid]
    return [device.uuid for device in found if device.parent is None]


def _resolve(
    entry: str, gpus: Sequence[DeviceState], devices: Sequence[DeviceState]
) -> DeviceState | None:
    """Return the device that one entry names: an ordinal, a UUID or a unique prefix of one."""
    if entry.isascii() and entry.isdigit():
        chosen = gpus[int(entry)] if int(entry) < len(gpus) else None
    elif entry.startswith(("GPU-", "MIG-")):
        exact = [device for device in devices if device.uuid == entry]
        # Only GPUs may be abbreviated.
        begun = [gpu for gpu in gpus if gpu.uuid.startswith(entry) and len(entry) > len("GPU-")]
        matches = exact or begun
        chosen = matches[0] if len(matches) == 1 else None
    else:
        chosen = None
    if chosen is not None and chosen.mig_enabled:
        # A GPU in MIG mode stands for its first instance.
        return next((d for d in devices if d.parent == chosen.record), None)
    return chosen
