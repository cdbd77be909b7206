"""The backend, which comes up when it is first asked for."""

from __future__ import annotations

import gpusim

caches_cleared = 0
_backend: list[Device] = []


class XlaRuntimeError(RuntimeError):
    """What XLA raises, its status in front."""


XlaRuntimeError.__module__ = "jaxlib.xla_extension"


class Device:
    """One visible device, with a pool that grows by what is asked and never shrinks."""

    platform = "gpu"

    def __init__(self, index: int) -> None:
        self.index = index
        self._segments: list[gpusim.Allocation] = []
        self._in_use = self._peak = self._allocations = 0

    def take(self, nbytes: int) -> None:
        missing = self._in_use + nbytes - self._pool
        if missing > 0:
            try:
                self._segments.append(gpusim.alloc(missing, self.index))
            except gpusim.OutOfMemoryError:
                raise XlaRuntimeError(
                    f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {nbytes} bytes."
                ) from None
        self._in_use += nbytes
        self._allocations += 1
        self._peak = max(self._peak, self._in_use)

    def give(self, nbytes: int) -> None:
        self._in_use -= nbytes

    def memory_stats(self) -> dict[str, int]:
        return {
            "num_allocs": self._allocations,
            "bytes_in_use": self._in_use,
            "peak_bytes_in_use": self._peak,
            "pool_bytes": self._pool,
        }

    @property
    def _pool(self) -> int:
        return sum(segment.nbytes for segment in self._segments)


def backends_are_initialized() -> bool:
    return bool(_backend)


def backend() -> list[Device]:
    if not _backend:
        _backend.extend(Device(index) for index in range(gpusim.device_count()))
    return _backend
