"""What tests need of torch, on simulated VRAM: bytes on a device, and `torch.cuda`."""

from __future__ import annotations

import weakref
from typing import Any

__version__ = "2.13.0"
uint8, float32 = ("uint8", 1), ("float32", 4)


class OutOfMemoryError(RuntimeError):
    """An allocation did not fit the device, or the process's share of it."""


class device:
    """A place for tensors, such as `cuda:0`."""

    def __init__(self, name: str) -> None:
        kind, _, index = str(name).partition(":")
        self.type, self.index = kind, int(index or 0)


class Tensor:
    """So many bytes; on the GPU they are taken from its caching allocator."""

    def __init__(self, nbytes: int, where: device) -> None:
        self.nbytes, self.device = nbytes, where
        self.is_cuda = where.type == "cuda"
        if self.is_cuda:
            block = cuda.allocator(where.index).take(nbytes)
            weakref.finalize(self, cuda.allocator(where.index).give, block).atexit = False

    def cuda(self) -> Tensor:
        return Tensor(self.nbytes, device("cuda"))


def empty(size: int | tuple[int, ...], dtype: Any = float32, device: Any = "cpu") -> Tensor:
    """An uninitialised tensor."""
    count = 1
    for length in (size,) if isinstance(size, int) else size:
        count *= length
    where = device if isinstance(device, globals()["device"]) else globals()["device"](device)
    return Tensor(count * dtype[1], where)


zeros = ones = empty

from . import cuda  # noqa: E402
