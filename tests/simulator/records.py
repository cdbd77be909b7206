"""Devices as a test describes them, written into the records of the state."""

from __future__ import annotations

from collections.abc import Sequence

from . import layout
from .hardware import Device, Mig
from .sizes import to_bytes

_MEMORY = {
    "normal": layout.MEMORY_NORMAL,
    "unsupported": layout.MEMORY_UNSUPPORTED,
    "zero": layout.MEMORY_ZERO,
}
_PROCESSES = {
    "normal": layout.PROCESSES_NORMAL,
    "hidden-memory": layout.PROCESSES_HIDDEN_MEMORY,
    "zero-memory": layout.PROCESSES_ZERO_MEMORY,
    "none": layout.PROCESSES_NONE,
}
_MIG_CAPABLE = {(8, 0), (9, 0), (10, 0)}


def fill_state(state: layout.State, devices: Sequence[Device]) -> None:
    """Write *devices* into a state that is all zeros."""
    instances = [(gpu, place) for gpu, d in enumerate(devices) for place in range(len(d.mig))]
    if len(devices) + len(instances) > layout.DEVICE_LIMIT:
        raise ValueError(f"at most {layout.DEVICE_LIMIT} devices and MIG instances")
    state.magic, state.version = layout.MAGIC, layout.VERSION
    state.gpu_count = len(devices)
    state.device_count = len(devices) + len(instances)
    for index, device in enumerate(devices):
        _fill_gpu(state.devices[index], index, device)
    for record, (gpu, place) in enumerate(instances, start=len(devices)):
        _fill_instance(state.devices[record], gpu, place, devices[gpu])
    uuids = [state.devices[record].uuid for record in range(state.device_count)]
    if len(set(uuids)) != len(uuids):
        raise ValueError("two devices have the same UUID")


def _fill_gpu(record: layout.DeviceRecord, index: int, device: Device) -> None:
    _fill_common(record, device)
    record.number = index
    record.parent = layout.NO_PARENT
    record.uuid = (device.uuid or f"GPU-00000000-0000-0000-0000-{index:012d}").encode()
    record.name = device.name.encode()
    record.total = to_bytes(device.total)
    record.reserved = to_bytes(device.reserved)
    record.foreign = 0 if device.mig else to_bytes(device.used)
    record.mig_enabled = bool(device.mig)
    record.mig_capable = bool(device.mig) or device.capability in _MIG_CAPABLE
    inside = sum(to_bytes(mig.total) for mig in device.mig)
    if record.foreign + record.reserved > record.total or inside > record.total:
        raise ValueError(f"device {index} holds more than its total: {device}")
    numbers = [_number(device.mig[place], place) for place in range(len(device.mig))]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two MIG instances of device {index} have the same index")


def _fill_instance(record: layout.DeviceRecord, gpu: int, place: int, device: Device) -> None:
    mig = device.mig[place]
    _fill_common(record, device)
    record.number = _number(mig, place)
    record.parent = gpu
    record.uuid = (mig.uuid or f"MIG-00000000-0000-0000-{gpu:04d}-{place:012d}").encode()
    record.name = f"{device.name} MIG {to_bytes(mig.total) >> 30}gb".encode()
    record.total = to_bytes(mig.total)
    record.foreign = to_bytes(mig.used)
    if record.foreign > record.total:
        raise ValueError(f"a MIG instance holds more than its total: {mig}")


def _fill_common(record: layout.DeviceRecord, device: Device) -> None:
    record.compute_mode = device.compute_mode
    record.capability_major, record.capability_minor = device.capability
    record.memory_mode = _MEMORY[device.memory]
    record.process_mode = _PROCESSES[device.processes]
    record.pid_offset = device.pid_offset


def _number(mig: Mig, place: int) -> int:
    return place if mig.index is None else mig.index
