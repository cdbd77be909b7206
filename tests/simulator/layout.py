"""The layout of the shared state file: the one place where it is described.

Python maps the file through these ctypes structures; the C library is compiled against
a header that `c_header` generates from them, so the two cannot drift apart. The compiler
checks every size and offset again.

All numbers are in the machine's byte order. Sizes are in bytes, times in nanoseconds of
CLOCK_MONOTONIC, which is the same clock in every process of a host.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_double, c_int32, c_uint32, c_uint64
from typing import Any

MAGIC = 0x4D49535550475350
VERSION = 1
DEVICE_LIMIT = 32
SLOT_LIMIT = 4096
INJECTION_LIMIT = 64

MEMORY_NORMAL, MEMORY_UNSUPPORTED, MEMORY_ZERO = range(3)
PROCESSES_NORMAL, PROCESSES_HIDDEN_MEMORY, PROCESSES_ZERO_MEMORY, PROCESSES_NONE = range(4)
SLOT_FREE, SLOT_DATA, SLOT_CONTEXT = range(3)
ANY_DEVICE = -1
NO_PARENT = -1


class DeviceRecord(ctypes.Structure):
    """A GPU, or a MIG instance. GPUs come first, in NVML's order."""

    _fields_ = [
        ("total", c_uint64),
        ("reserved", c_uint64),  # the driver's own share: in v1 "used", not in v2 "used"
        ("foreign", c_uint64),  # held by somebody who is in no process list
        ("peak_used", c_uint64),  # highest foreign + allocated seen
        ("oom_count", c_uint64),  # allocations refused
        ("parent", c_int32),  # record of the GPU that a MIG instance is part of
        ("number", c_uint32),  # NVML index of a GPU, MIG index of an instance
        ("mig_capable", c_uint32),
        ("mig_enabled", c_uint32),
        ("compute_mode", c_uint32),
        ("capability_major", c_int32),
        ("capability_minor", c_int32),
        ("memory_mode", c_uint32),
        ("process_mode", c_uint32),
        ("pid_offset", c_int32),  # added to each PID that NVML reports
        ("uuid", c_char * 96),
        ("name", c_char * 96),
    ]


class SlotRecord(ctypes.Structure):
    """One allocation, or the context of one process on one device.

    `state` is written last: a process killed while it fills in a slot leaves it free.
    """

    _fields_ = [
        ("state", c_uint32),
        ("device", c_uint32),
        ("pid", c_uint32),
        ("unused", c_uint32),
        ("started", c_uint64),  # start time of the process in clock ticks: PIDs are reused
        ("size", c_uint64),
        ("serial", c_uint64),  # tells this allocation from an earlier one in the same slot
        ("dead_at", c_uint64),  # when the process was first seen dead; 0: alive
    ]


SLOT_FORMAT = "=4I4Q"
"""A SlotRecord for the struct module, which decodes many at once."""


class InjectionRecord(ctypes.Structure):
    """What calls of one function, or of all whose names begin alike, answer."""

    _fields_ = [
        ("delay", c_double),  # seconds
        ("code", c_int32),  # NVML return code; 0: answer as usual
        ("device", c_int32),  # record number, or ANY_DEVICE
        ("first", c_uint32),  # calls that are left alone before the first one hit
        ("count", c_uint32),  # calls hit; 0: all that follow
        ("calls", c_uint32),  # calls seen so far, over all processes
        ("unused", c_uint32),
        ("function", c_char * 64),  # "name", or "prefix*"
    ]


class State(ctypes.Structure):
    """The whole file."""

    _fields_ = [
        ("magic", c_uint64),
        ("version", c_uint32),
        ("device_count", c_uint32),  # GPUs and MIG instances
        ("gpu_count", c_uint32),
        ("slot_count", c_uint32),  # slots at and above this one are free
        ("injection_count", c_uint32),
        ("cuda_version", c_int32),  # as NVML has it: 13000 for 13.0
        ("serial", c_uint64),
        ("context", c_uint64),  # bytes that the first allocation of a process adds
        ("late_free", c_uint64),  # nanoseconds that VRAM outlives its process
        ("driver", c_char * 80),
        ("devices", DeviceRecord * DEVICE_LIMIT),
        ("injections", InjectionRecord * INJECTION_LIMIT),
        ("slots", SlotRecord * SLOT_LIMIT),
    ]


_C_NAMES: dict[Any, str] = {
    c_uint32: "uint32_t",
    c_int32: "int32_t",
    c_uint64: "uint64_t",
    c_double: "double",
    c_char: "char",
    DeviceRecord: "sim_device",
    SlotRecord: "sim_slot",
    InjectionRecord: "sim_injection",
    State: "sim_state",
}
_CONSTANTS = [name for name, value in list(globals().items()) if isinstance(value, int)]


def c_header() -> str:
    """Return the C header that describes this layout."""
    lines = ["/* Generated from layout.py. */", "#include <stddef.h>", "#include <stdint.h>"]
    lines += [f"#define {name} ({globals()[name]})" for name in _CONSTANTS]
    for record in (DeviceRecord, SlotRecord, InjectionRecord, State):
        lines += _c_struct(record)
    return "\n".join(lines) + "\n"


def _c_struct(record: type[ctypes.Structure]) -> list[str]:
    name = _C_NAMES[record]
    members, checks = [], []
    for field, kind, *_ in record._fields_:
        length = getattr(kind, "_length_", None)
        element = kind if length is None else getattr(kind, "_type_")  # noqa: B009 (not typed)
        members.append(f"    {_C_NAMES[element]} {field}{f'[{length}]' if length else ''};")
        offset = getattr(record, field).offset
        checks.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{field}");')
    checks.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(record)}, "{name}");')
    return ["typedef struct {", *members, f"}} {name};", *checks]
