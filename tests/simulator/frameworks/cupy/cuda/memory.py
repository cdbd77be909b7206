"""CuPy's pool: blocks of 512 bytes' multiples, kept by size until `free_all_blocks`."""

from __future__ import annotations

import os
from collections import defaultdict

import gpusim
from simulator.sizes import to_text

ROUND = 512
context_is_up = False


class OutOfMemoryError(MemoryError):
    """The pool's limit, or the device, cannot give so much."""


class MemoryPool:
    """The pool of the first device."""

    def __init__(self) -> None:
        self._free: dict[int, list[gpusim.Allocation]] = defaultdict(list)
        self._used: dict[int, list[gpusim.Allocation]] = defaultdict(list)

    def malloc(self, nbytes: int) -> int:
        global context_is_up
        size = -(-nbytes // ROUND) * ROUND
        if not self._free[size]:
            limit = int(os.environ.get("CUPY_GPU_MEMORY_LIMIT", "0"))
            if limit and self.total_bytes() + size > limit:
                self.free_all_blocks()
            if limit and self.total_bytes() + size > limit:
                raise self._refusal(size)
            try:
                self._free[size].append(gpusim.alloc(size))
            except gpusim.OutOfMemoryError:
                self.free_all_blocks()
                try:
                    self._free[size].append(gpusim.alloc(size))
                except gpusim.OutOfMemoryError:
                    raise self._refusal(size) from None
            context_is_up = True
        self._used[size].append(self._free[size].pop())
        return size

    def give(self, size: int) -> None:
        self._free[size].append(self._used[size].pop())

    def used_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._used.items())

    def total_bytes(self) -> int:
        return self.used_bytes() + sum(size * len(blocks) for size, blocks in self._free.items())

    def free_all_blocks(self) -> None:
        for blocks in self._free.values():
            while blocks:
                blocks.pop().free()

    def _refusal(self, size: int) -> Exception:
        return OutOfMemoryError(
            f"Out of memory allocating {size:,} bytes (allocated so far: "
            f"{self.used_bytes():,} bytes, {to_text(self.total_bytes())} in the pool)."
        )
