"""What runs inside the checked processes: CUDA's driver API by ctypes, and notes for outside.

Copied into each project that a check runs, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import uuid

NOTES = "notes.jsonl"
OUT_OF_MEMORY = 2
NO_DEVICE = 100


class CudaError(RuntimeError):
    """A call of the driver that failed; `code` is CUDA's number."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: CUDA error {code}")
        self.code = code


def note(**facts: object) -> None:
    """Tell the check that started this process; several processes may do so at once."""
    line = json.dumps({"worker": os.environ.get("PYTEST_XDIST_WORKER", "main"), **facts})
    file = os.open(NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def placement() -> dict[str, object]:
    """What this process sees by the driver, and what the plugin says of it."""
    import pytest_gpushare

    place = pytest_gpushare.current()
    return {
        "role": place.role,
        "device": place.device,
        "slot": place.vram,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "seen": seen(),
    }


def seen() -> list[str]:
    """UUIDs of the devices that CUDA shows this process, without `GPU-` or `MIG-`."""
    try:
        cuda = _driver()
    except CudaError as error:
        if error.code == NO_DEVICE:
            return []
        raise
    count = ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    return [_uuid(cuda, number) for number in range(count.value)]


class Context:
    """A CUDA context on the first visible device, as frameworks make it."""

    def __init__(self) -> None:
        self._cuda = _driver()
        device, context = ctypes.c_int(), ctypes.c_void_p()
        _call(self._cuda, "cuDeviceGet", ctypes.byref(device), 0)
        # The primary context is the one that frameworks share.
        _call(self._cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _call(self._cuda, "cuCtxSetCurrent", context)

    def take(self, size: int) -> None:
        """Take so many bytes until the process ends; CudaError 2 where they are refused."""
        pointer = ctypes.c_uint64()
        _call(self._cuda, "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))

    def free(self) -> int:
        """Bytes that CUDA says are free on the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _call(self._cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


def _driver() -> ctypes.CDLL:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    _call(cuda, "cuInit", 0)
    return cuda


def _uuid(cuda: ctypes.CDLL, number: int) -> str:
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), number)
    # The second version answers with the MIG instance's own, where it is one.
    _call(cuda, "cuDeviceGetUuid_v2", raw, device)
    return str(uuid.UUID(bytes=bytes(raw)))


def _call(cuda: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        raise CudaError(name, code)
