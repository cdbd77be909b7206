"""Simulated VRAM for tests: what torch would be if it did nothing but allocate.

    with gpusim.alloc("4GB"):
        ...

The device is the one that CUDA would pick: the first that CUDA_VISIBLE_DEVICES lets it
see. The variable is read once per process, at the first use, as CUDA reads it.
"""

from __future__ import annotations

import os
import weakref

from simulator.hardware import OutOfMemoryError
from simulator.machine import Machine
from simulator.sizes import Size, to_bytes
from simulator.visibility import visible_devices

__all__ = [
    "Allocation",
    "NoGpuError",
    "OutOfMemoryError",
    "alloc",
    "available",
    "device",
    "device_count",
    "mem_get_info",
]


class NoGpuError(RuntimeError):
    """CUDA sees no device."""


class _Process:
    """What one process sees: the machine, and the UUIDs of the visible devices."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.machine = Machine.open()
        self.visible = visible_devices(self.machine.snapshot(), os.environ)


_process: _Process | None = None


def _here() -> _Process:
    global _process
    if _process is None or _process.pid != os.getpid():  # a forked child starts afresh
        _process = _Process()
    return _process


class Allocation:
    """VRAM held; given back by `free`, at the end of a with block, or when collected."""

    def __init__(self, nbytes: int, device: int = 0) -> None:
        """Take *nbytes* bytes on the visible device number *device*."""
        self.nbytes = nbytes
        self.device = _uuid(device)
        owner = _here()
        handle = owner.machine.allocate(self.device, nbytes)
        self._finalizer = weakref.finalize(self, _give_back, owner, handle)
        # At the end of the process the VRAM goes as it does in reality: with the process,
        # and late if the machine is told so.
        self._finalizer.atexit = False

    def free(self) -> None:
        """Give the VRAM back; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Allocation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.free()

    def __repr__(self) -> str:
        state = "held" if self._finalizer.alive else "freed"
        return f"<{self.nbytes} bytes on {self.device}, {state}>"


def _give_back(owner: _Process, handle: int) -> None:
    # What a forked child inherited belongs to its parent.
    if owner.pid == os.getpid():
        owner.machine.release(handle)


def alloc(size: Size, device: int = 0) -> Allocation:
    """Take VRAM: bytes, or text such as "4GB". Raises OutOfMemoryError if it does not fit."""
    return Allocation(to_bytes(size), device)


def device_count() -> int:
    """Return how many devices CUDA shows to this process."""
    return len(_here().visible)


def available() -> bool:
    """Tell whether CUDA shows this process any device."""
    try:
        return device_count() > 0
    except (RuntimeError, FileNotFoundError):
        return False


def device(number: int = 0) -> str:
    """Return the UUID of the visible device *number*; raises NoGpuError if there is none."""
    return _uuid(number)


def mem_get_info(device: int = 0) -> tuple[int, int]:
    """Return (free, total) of a visible device, in bytes."""
    uuid = _uuid(device)
    state = next(state for state in _here().machine.snapshot() if state.uuid == uuid)
    return state.free, state.total


def _uuid(number: int) -> str:
    visible = _here().visible
    if not visible:
        raise NoGpuError("no CUDA-capable device is detected")
    if not 0 <= number < len(visible):
        raise NoGpuError(f"invalid device ordinal {number}; {len(visible)} visible")
    return visible[number]
