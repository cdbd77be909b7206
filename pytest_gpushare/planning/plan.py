"""The plan: slots, CPU workers, and the reason for each figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.gpu.devices import ComputeMode, Device
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.ollama.reservation import Demand


class Limit(str, Enum):
    """A figure that can decide the number of workers, in the order in which ties are resolved."""

    BY_NEED = "min_vram_per_worker_gb"
    BY_SCALE = "max_workers_per_gb"
    BY_CAP = "max_workers_per_gpu"
    BY_MODE = "compute mode"
    NUMBER = "-n"
    MAXPROCESSES = "--maxprocesses"
    RAM = "ram_per_worker_gb"
    CPUS = "CPUs"
    IN_PROCESS = "no workers"
    HOOK = "a pytest_gpushare_plan hook"


class Request(NamedTuple):
    """How many workers the user asked for, from xdist's options."""

    number: int | None = None
    """N of `-n N`; None where the plan decides. Also what `-n auto` came to."""
    maxprocesses: int | None = None
    in_process: bool = False
    """`-n 0` or `--pdb`: no workers, the process itself is placed."""
    fixed: bool = False
    """`--tx` lists the workers: those beyond the slots are there too, and see no GPU."""


class LeasedByOthers(NamedTuple):
    """What other sessions claim, by UUID, in bytes."""

    leases: Mapping[str, int] = MappingProxyType({})
    """What is leased and not yet taken, so that it is still free."""
    reserved: Mapping[str, int] = MappingProxyType({})
    """The most that one of them publishes as kept for servers."""


class DeviceShare(NamedTuple):
    """What of one device is kept for one server; bytes."""

    name: str
    reservation: int
    resident: int
    """What of it the server holds already."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The share of one GPU worker: a device and its VRAM in bytes."""

    device: Device
    vram: int
    assumed_need: int = 0
    """What a test of unknown need counts as; 0: the whole slot. Under preset packed it is the
    slot that the other presets give: an unknown need is no small need."""

    @property
    def unknown_need(self) -> int:
        """Bytes that admission reserves for a test of which no need is known."""
        return self.assumed_need or self.vram


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The arithmetic for one device, step by step; sizes in bytes."""

    device: Device
    reservation: int
    """VRAM kept for neighbours on this device; 0 where they do not use it."""
    resident: int
    """What of it the neighbours hold already, so that it is in `used` and not reserved twice."""
    outstanding: int
    safety_buffer: int
    most: int | None
    """The slot of the outer run in which this run lives; None: no such limit."""
    budget: int
    by_need: int
    by_scale: int | None
    """None: no limit."""
    by_cap: int | None
    """None: no limit."""
    by_mode: int | None
    """What the device's compute mode allows; None: no limit."""
    fitting: int
    """Workers that fit by the figures above."""
    limited_by: Limit
    """Which of them decided."""
    workers: int
    """Workers that are left after the limits of the whole run."""
    assumed_need: int = 0
    """See `Slot.assumed_need`."""
    leases: int = 0
    """What other sessions have leased and not yet taken, and what is kept for those that asked
    before this one."""

    alone: int = 0
    """The budget without other sessions, where tests are admitted by their needs: they may have
    what the others give back."""

    asked: int | None = None
    """What this session keeps for neighbours itself, where `reservation` is what another session
    keeps; None: they are the same."""

    shares: tuple[DeviceShare, ...] = ()
    """`reservation` and `resident` by server."""

    @property
    def reach(self) -> int:
        """The most bytes that tests may hold there at any time of the run."""
        return max(self.budget, self.alone)

    def share_of(self, name: str) -> DeviceShare:
        """What is kept for one server there."""
        return next((each for each in self.shares if each.name == name), DeviceShare(name, 0, 0))

    @property
    def own_reservation(self) -> int:
        """Bytes that this session keeps for neighbours, and publishes, whatever others keep."""
        return self.reservation if self.asked is None else self.asked

    @property
    def slot_vram(self) -> int:
        """Bytes of VRAM for each of the device's workers; 0 without workers."""
        return self.budget // self.workers if self.workers else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The slots, the number of CPU workers, and the reason for each figure."""

    slots: tuple[Slot, ...]
    """One for each GPU worker, dealt round robin over the devices."""
    cpu_workers: int
    limited_by: tuple[Limit, ...]
    """The figures that decided; several where they differ between devices."""
    devices: tuple[DevicePlan, ...]
    limits: tuple[tuple[Limit, int], ...]
    """The limits of the whole run that were looked at, with their values."""
    request: Request
    absence: str = ""
    """Why there is no device, where there is none."""
    needed: int = 0
    """Bytes that a GPU worker needs at least."""
    demand: Demand | None = None
    """What the models need that the user named; None where none is named."""
    is_released: bool = False
    """Whether nothing is kept for Ollama because no server was reached."""

    @property
    def usable(self) -> int:
        """Bytes of the largest budget."""
        return max((device.budget for device in self.devices), default=0)

    @property
    def workers(self) -> int:
        """All workers that the run starts; 0 where the process itself runs the tests."""
        return 0 if self.request.in_process else len(self.slots) + self.cpu_workers


_MODES = {
    ComputeMode.PROHIBITED: "its compute mode PROHIBITED lets no process in",
    ComputeMode.EXCLUSIVE: "its compute mode EXCLUSIVE_PROCESS keeps others out while it is used",
}


def shortage(plan: Plan) -> str:
    """What a plan without slots lacks: devices, VRAM, or a device that lets a worker in."""
    if plan.absence:
        return f"no GPU: {plan.absence}"
    if plan.limited_by == (Limit.HOOK,):
        return f"{Limit.HOOK.value} left no GPU worker"
    barred = [planned.device for planned in plan.devices if planned.limited_by is Limit.BY_MODE]
    if len(barred) == len(plan.devices):
        return "; ".join(f"{device.label}: {_MODES[device.compute_mode]}" for device in barred)
    leased = ", other sessions lease VRAM" if any(each.leases for each in plan.devices) else ""
    return (
        f"insufficient VRAM per worker: {format_gb(plan.usable)} usable, "
        f"{format_gb(plan.needed)} needed{leased}; gpu_share_min_vram_per_worker_gb"
    )
