"""The vendors whose GPUs can be read: one module each, named in `VENDORS`.

A vendor's module has a `Vendor`: the variable by which a process is shown its devices, and a class
with the methods of `Probe`. Only this module reads the vendor's driver. What else depends on the
vendor: caps and counters of frameworks (`planning/caps.py`, `worker/`), whether CUDA or its MPS is
up (`session/start.py`, `gpu/host.py`), and the advice in `cli/doctor/`, which is NVIDIA's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.timed import call_within

VENDORS = ("pytest_gpushare.gpu.nvml:NVIDIA",)
"""Each vendor as `module:name` of its `Vendor`. Imported by the first run that plans, or that reads
its own device. Devices of several are numbered apart: `Device.index` is unique on a host."""

NeighbourOf = Callable[[int], str]
"""Names the neighbour whose process a PID is; empty for any other."""


class DeviceReader(Protocol):
    """What reads devices, such as an open probe."""

    def memory(self) -> Mapping[str, Memory]:
        """UUID -> VRAM now; a device that cannot be read is left out."""

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        """UUID -> processes that hold VRAM there; None where the driver lists none."""


class Probe(DeviceReader, Protocol):
    """The devices of one vendor's driver, or of several. No method but `memory` and `processes`
    of a device that is lost raises: an error is an absence, or a problem of one device."""

    @property
    def library(self) -> str:
        """The name of the driver's library, such as `NVML`."""

    def open(self) -> None:
        """Load the driver's library; an error is kept for `read`."""

    def read(self, environment: Mapping[str, str]) -> GpuFacts:
        """The devices now, or why there are none. Those that this environment hides from a
        process are in `all_devices` alone."""

    def remedy_when_slow(self, environment: Mapping[str, str], /) -> str:
        """What to do where `open` and `read` take too long."""

    def processes_on(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        """Processes that hold VRAM on one device; None where the driver lists none."""

    def versions(self) -> Mapping[str, str]:
        """What `doctor` shows beside the driver's version: name -> version."""

    def close(self) -> None:
        """Release the library; harmless when called twice."""


class Vendor(NamedTuple):
    """What a run has to know of a vendor's devices."""

    probe: Callable[[NeighbourOf], Probe]
    variable: str
    """The environment variable by which a process is shown devices; `Device.variable` of each."""
    numbering: tuple[str, str] | None = None
    """The variable, and its value, with which numbers in `variable` are `Device.index`; None:
    `gpu_share_device_names = index` leaves these devices alone."""
    caps: tuple[str, ...] = ()
    """Names of the rules in `planning/caps.py` that hold on these devices."""


def vendors() -> tuple[Vendor, ...]:
    """All vendors, the first one's devices first."""
    named = (entry.partition(":") for entry in VENDORS)
    return tuple(getattr(import_module(module), name) for module, _, name in named)


def vendor_of(device: Device) -> Vendor | None:
    """The vendor of a device; None for one that a hook added."""
    return next((v for v in vendors() if v.variable == device.variable), None)


def variables() -> tuple[str, ...]:
    """The variables by which processes are shown devices, by vendor."""
    return tuple(vendor.variable for vendor in vendors())


def settling_variables() -> tuple[str, ...]:
    """Those, and the ones that say how their numbers count."""
    return (*variables(), *(v.numbering[0] for v in vendors() if v.numbering is not None))


def open_later(neighbour_of: NeighbourOf = lambda _pid: "") -> Probe:
    """The probe of all vendors' devices; not open yet."""
    probes = [vendor.probe(neighbour_of) for vendor in vendors()]
    return probes[0] if len(probes) == 1 else _Joined(probes)


class _Joined:
    """The probes of several vendors as one; a driver that hangs hides the devices of all."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._asked = probes[0]
        """The one that is opened or read now, or was last."""

    @property
    def library(self) -> str:
        return self._asked.library

    def open(self) -> None:
        for probe in self._probes:
            self._asked = probe
            probe.open()

    def read(self, environment: Mapping[str, str]) -> GpuFacts:
        found = []
        for probe in self._probes:
            self._asked = probe
            found.append(probe.read(environment))
        devices = tuple(device for facts in found for device in facts.devices)
        return GpuFacts(
            devices=devices,
            all_devices=tuple(device for facts in found for device in facts.all_devices),
            # A host with the devices of one vendor lacks nothing.
            absence="" if devices else "; ".join(f.absence for f in found if f.absence),
            problems=tuple(problem for facts in found for problem in facts.problems),
            driver=", ".join(facts.driver for facts in found if facts.driver) or None,
            own_process_has_context=any(facts.own_process_has_context for facts in found),
        )

    def remedy_when_slow(self, environment: Mapping[str, str]) -> str:
        return self._asked.remedy_when_slow(environment)

    def memory(self) -> Mapping[str, Memory]:
        return {uuid: m for probe in self._probes for uuid, m in probe.memory().items()}

    def processes(self) -> Mapping[str, tuple[GpuProcess, ...] | None]:
        return {uuid: found for probe in self._probes for uuid, found in probe.processes().items()}

    def processes_on(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        found = (probe.processes_on(uuid) for probe in self._probes)
        return next((processes for processes in found if processes is not None), None)

    def versions(self) -> Mapping[str, str]:
        return {name: text for probe in self._probes for name, text in probe.versions().items()}

    def close(self) -> None:
        for probe in self._probes:
            probe.close()


class OneDevice:
    """The process list of one device, for a worker that reads its own; opened by the first
    reading and never closed: the end of the process does that."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._probe: Probe | None = None

    def memory(self) -> dict[str, Memory]:
        """Nothing: memory says nothing of this process."""
        return {}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        """The processes on the device; None without the driver."""
        if self._probe is None:
            self._probe = open_later()
            self._probe.open()
            self._probe.read({})
        return {self._uuid: self._probe.processes_on(self._uuid)}


_OWN_TIMEOUT = 1.0
"""Seconds for which a worker waits for the driver at its end."""


def own_vram(uuid: str) -> int | None:
    """Bytes of this process on the device of that UUID; None where the driver gives none in
    time. The library is opened for a moment only."""
    return call_within(_OWN_TIMEOUT, lambda: _own_vram(uuid), "devices")


def _own_vram(uuid: str) -> int | None:
    probe = open_later()
    probe.open()
    try:
        probe.read({})
        found = probe.processes_on(uuid) or ()
    finally:
        probe.close()
    sizes = [each.used for each in found if each.pid == os.getpid() and each.used is not None]
    return sum(sizes) if sizes else None
