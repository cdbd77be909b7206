"""What tests need of CuPy, on simulated VRAM: arrays of bytes from a pool that keeps them."""

from __future__ import annotations

import weakref

from . import cuda
from .cuda.memory import MemoryPool, OutOfMemoryError

_pool = MemoryPool()


class _PinnedMemoryPool:
    def free_all_blocks(self) -> None:
        pass


class ndarray:
    """So many bytes of a pool."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = _pool.malloc(nbytes)
        weakref.finalize(self, _pool.give, self.nbytes).atexit = False


def empty(size: int, dtype: str = "uint8") -> ndarray:
    return ndarray(size)


zeros = empty


def get_default_memory_pool() -> MemoryPool:
    return _pool


def get_default_pinned_memory_pool() -> _PinnedMemoryPool:
    return _PinnedMemoryPool()


__all__ = ["OutOfMemoryError", "cuda", "empty", "ndarray", "zeros"]
