"""What a simulated machine is made of, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sizes import Size

MemoryMode = Literal["normal", "unsupported", "zero"]
"""What memory info answers: figures, NOT_SUPPORTED, or a total of 0 (unified memory)."""

ProcessMode = Literal["normal", "hidden-memory", "zero-memory", "none"]
"""What process lists answer: PIDs and bytes, PIDs with unknown bytes (WDDM, WSL2), PIDs
with 0 bytes (some containers), or NOT_SUPPORTED."""


@dataclass(frozen=True)
class Mig:
    """One MIG instance of a GPU.

    total, used: size, and what somebody in no process list holds of it.
    index: the MIG index, which may leave gaps; by default the position in the tuple.
    uuid: by default derived from the positions.
    """

    total: Size = "10GB"
    used: Size = 0
    index: int | None = None
    uuid: str | None = None


@dataclass(frozen=True)
class Device:
    """One GPU.

    total: what NVML calls total; the driver's own share is part of it.
    used: held by somebody who is in no process list. Ignored with MIG instances, whose
        sum a GPU in MIG mode reports.
    reserved: the driver's own share: in memory info v1 part of `used`, in v2 not.
    mig: instances; with at least one, the GPU is in MIG mode and takes no allocations.
    compute_mode: 0 default, 2 prohibited, 3 exclusive process.
    capability: CUDA compute capability; 8.0, 9.0 and 10.0 can do MIG.
    pid_offset: added to every PID in process lists, as when a container sees host PIDs.
    """

    total: Size = "24GB"
    used: Size = "2GB"
    name: str = "NVIDIA GeForce RTX 3090 Ti"
    uuid: str | None = None
    reserved: Size = 0
    mig: tuple[Mig, ...] = ()
    compute_mode: int = 0
    capability: tuple[int, int] = (8, 6)
    memory: MemoryMode = "normal"
    processes: ProcessMode = "normal"
    pid_offset: int = 0


@dataclass(frozen=True)
class DeviceState:
    """One device at one moment. Sizes are in bytes.

    record: position in the snapshot: GPUs in NVML's order, then MIG instances.
    used: foreign and allocated, without `reserved`; free = total - reserved - used.
    peak_used: the highest `used` since the machine was created.
    oom_count: allocations refused.
    processes: (PID, bytes with context) of the living, by PID, without `pid_offset`.
    parent, mig_index: of a MIG instance, the record of its GPU and its index there.
    """

    record: int
    uuid: str
    name: str
    total: int
    reserved: int
    used: int
    free: int
    peak_used: int
    oom_count: int
    processes: tuple[tuple[int, int], ...]
    parent: int | None
    mig_index: int | None
    capability: tuple[int, int]
    mig_enabled: bool


class OutOfMemoryError(RuntimeError):
    """An allocation did not fit; nothing was changed."""
