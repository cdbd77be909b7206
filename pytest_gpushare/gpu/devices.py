"""Devices and hosts as frozen values, in bytes; what is unknown is None."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.units import MOST_VRAM, parse_size


class GpuProcess(NamedTuple):
    """A process that holds VRAM on a device, from NVML's list of compute processes."""

    pid: int
    used: int | None
    """Bytes of VRAM; None where the driver gives none (WDDM, WSL 2, containers)."""
    neighbour: str = ""
    """The neighbour whose process it is, such as `Ollama`; empty for every other process."""


class Memory(NamedTuple):
    """VRAM of a device at one moment, in bytes."""

    total: int
    used: int
    free: int


class ComputeMode(Enum):
    """How many processes may use a device at once (nvidia-smi -c)."""

    DEFAULT = 0
    PROHIBITED = 2
    EXCLUSIVE = 3


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU or one MIG instance, as NVML described it."""

    uuid: str
    name: str
    index: str
    """NVML's index as nvidia-smi shows it: "0", or "0.1" for a MIG instance of GPU 0."""
    total: int
    """Bytes of VRAM."""
    used: int
    """Bytes in use by all processes; on memory that is shared with the CPU, by the whole system."""
    free: int
    """Bytes that NVML reports as free: decisions are made on this."""
    processes: tuple[GpuProcess, ...] | None = None
    """Processes that hold VRAM there; None where the driver lists none."""
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) where it is unknown."""
    parent: str = ""
    """UUID of the GPU of which this is a MIG instance; empty for a whole GPU."""
    variable: str = "CUDA_VISIBLE_DEVICES"
    """The environment variable by which a process is shown this device."""
    visible_as: str = ""
    """What is written there; empty: its UUID."""
    unified: bool = False
    """Whether the device has no memory of its own but shares the host's."""
    host: str = ""
    """The host that it is in, where a run has several; empty: this one."""

    @property
    def selector(self) -> str:
        """What is written to `variable` for a process that is to see this device."""
        return self.visible_as or self.uuid

    @property
    def label(self) -> str:
        """`GPU 0`, or `box GPU 0`, as lines of output name it."""
        return f"{self.host} GPU {self.index}" if self.host else f"GPU {self.index}"


class GpuFacts(NamedTuple):
    """All that the probe of the devices found."""

    devices: tuple[Device, ...] = ()
    """The devices that this process may use, in the order of its visibility."""
    all_devices: tuple[Device, ...] = ()
    """Every device of the host, also those that the outer CUDA_VISIBLE_DEVICES hides."""
    absence: str = ""
    """Why there is no device to use, with the remedy; empty where there is one."""
    problems: tuple[str, ...] = ()
    """What went wrong on the way: devices that were left out, and why."""
    driver: str | None = None
    simulated: bool = False
    """Whether a what-if of the user stands in for NVML."""
    own_process_has_context: bool = False
    """Whether NVML lists the probing process itself: CUDA is up in it already."""


class HostFacts(NamedTuple):
    """What the host can carry."""

    cpus: int
    """Workers that xdist's `auto` would start."""
    available_ram: int | None = None
    """Bytes of RAM that are available without swapping; None where unknown."""
    outer_slot: int | None = None
    """Bytes of the slot in which this whole run lives, as a test of another run started it."""


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
    if size >= MOST_VRAM:
        raise _error(spec, f'"{text}" is more than any GPU has')
    return int(size)


def _error(spec: str, fact: str) -> SettingsError:
    return SettingsError(f"--gpu-share-simulate {spec[:80]}: {fact}: {_USAGE}")
