"""VRAM without a framework: on a simulated GPU, on a real one, or on none.

`hold("4GB")` lets this process hold that much VRAM in all, its CUDA context included,
until it ends. On a machine without a GPU it is a little ordinary memory instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys

GB = 1024**3
CONTEXT = 600 * 1024**2
"""What a CUDA context takes, roughly; in the simulation exactly."""


class Block:
    """What `hold` took: its size in bytes, and where."""

    def __init__(self, size: int, where: str, keep: object) -> None:
        self.size = size
        self.where = where
        self._keep = keep


@functools.cache
def hold(size: str) -> Block:
    """Hold this much VRAM from now on; raises an error if there is not enough."""
    wanted = _bytes(size)
    if os.environ.get("GPUSHARE_SIM_STATE"):
        return _simulated(wanted)
    cuda = _cuda()
    return _ordinary() if cuda is None else _real(cuda, wanted)


def _ordinary() -> Block:
    return Block(1024, "CPU", bytearray(1024))


def _simulated(wanted: int) -> Block:
    import gpusim

    if not gpusim.available():
        return _ordinary()
    return Block(wanted, gpusim.device(), gpusim.alloc(wanted - CONTEXT))


def _real(cuda: ctypes.CDLL, wanted: int) -> Block:
    size = ctypes.c_size_t(max(GB // 1024, wanted - CONTEXT))
    pointer = ctypes.c_uint64()
    _check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), size), f"allocating {size.value} bytes")
    # Write to all of it: memory that nobody touched would prove nothing.
    _check(cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(7), size), "writing")
    _check(cuda.cuCtxSynchronize(), "writing")
    return Block(wanted, "GPU", pointer)


def _cuda() -> ctypes.CDLL | None:
    """The CUDA driver with a context on the first visible device; None where there is none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0), "choosing the device")
    # The primary context is the one that frameworks share.
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "making a context")
    _check(cuda.cuCtxSetCurrent(context), "making a context")
    return cuda


def _check(code: int, doing: str) -> None:
    if code == 2:
        raise MemoryError(f"CUDA out of memory: {doing}")
    if code:
        raise RuntimeError(f"CUDA error {code}: {doing}")


def _bytes(size: str) -> int:
    match = re.fullmatch(r"([0-9.]+) ?GB", size)
    if match is None:
        raise ValueError(f"not a size: {size!r}; write for example 4GB")
    return int(float(match[1]) * GB)
