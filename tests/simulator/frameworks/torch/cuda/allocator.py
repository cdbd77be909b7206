"""A caching allocator as torch's: segments taken from the device, blocks cut from them.

Requests are rounded to 512 bytes; up to 1 MB they come from segments of 2 MB, below 10 MB from
segments of 20 MB, and from 10 MB on each has a segment rounded up to 2 MB. Freed blocks stay.
What does not fit makes the allocator give back its unused segments and try once more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import gpusim
from simulator.sizes import to_text

import torch

MB = 1024**2
ROUND, SMALL, SMALL_SEGMENT, LARGE_SEGMENT = 512, MB, 2 * MB, 20 * MB
LARGE_FROM = 10 * MB


@dataclass
class Segment:
    """One allocation of the device, and the blocks in it: offset -> (size, whether in use)."""

    vram: gpusim.Allocation
    small: bool
    blocks: dict[int, tuple[int, bool]] = field(default_factory=dict)

    @property
    def is_unused(self) -> bool:
        return not any(used for _, used in self.blocks.values())

    def merge(self) -> None:
        merged: dict[int, tuple[int, bool]] = {}
        last = None
        for offset in sorted(self.blocks):
            size, used = self.blocks[offset]
            if last is not None and not used and not merged[last][1]:
                merged[last] = (merged[last][0] + size, False)
            else:
                merged[offset] = (size, used)
                last = offset
        self.blocks = merged


class Allocator:
    """The allocator of one visible device."""

    def __init__(self, index: int, fraction: float) -> None:
        self.index, self.fraction = index, fraction
        self.segments: list[Segment] = []
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> tuple[Segment, int]:
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        small = size <= SMALL
        with self._lock:
            found = self._cached(size, small) or self._fresh(size, small)
            segment, offset = found
            whole, _ = segment.blocks[offset]
            if whole - size >= (ROUND if small else SMALL + 1):
                segment.blocks[offset + size] = (whole - size, False)
                whole = size
            segment.blocks[offset] = (whole, True)
            self.allocated += whole
            self.peak_allocated = max(self.peak_allocated, self.allocated)
            return segment, offset

    def give(self, block: tuple[Segment, int]) -> None:
        segment, offset = block
        with self._lock:
            size, _ = segment.blocks[offset]
            segment.blocks[offset] = (size, False)
            self.allocated -= size
            segment.merge()

    def empty_cache(self) -> None:
        with self._lock:
            for segment in [s for s in self.segments if s.is_unused]:
                self.segments.remove(segment)
                self.reserved -= segment.vram.nbytes
                segment.vram.free()

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def stats(self) -> dict[str, dict[str, dict[str, int]]]:
        return {
            "allocated_bytes": {
                "all": {"current": self.allocated, "peak": self.peak_allocated},
            },
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.peak_reserved}},
        }

    def _cached(self, size: int, small: bool) -> tuple[Segment, int] | None:
        fitting = [
            (length, id(segment), offset, segment)
            for segment in self.segments
            if segment.small == small
            for offset, (length, used) in segment.blocks.items()
            if not used and length >= size
        ]
        if not fitting:
            return None
        _, _, offset, segment = min(fitting)
        return segment, offset

    def _fresh(self, size: int, small: bool) -> tuple[Segment, int]:
        length = SMALL_SEGMENT if small else LARGE_SEGMENT
        if size >= LARGE_FROM:
            length = -(-size // (2 * MB)) * 2 * MB
        vram = self._from_device(length)
        if vram is None:
            self.empty_cache()
            vram = self._from_device(length)
        if vram is None:
            raise self._refusal(size)
        segment = Segment(vram, small, {0: (length, False)})
        self.segments.append(segment)
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return segment, 0

    def _from_device(self, length: int) -> gpusim.Allocation | None:
        total = gpusim.mem_get_info(self.index)[1]
        if self.reserved + length > self.fraction * total:
            return None
        try:
            return gpusim.alloc(length, self.index)
        except gpusim.OutOfMemoryError:
            return None

    def _refusal(self, size: int) -> Exception:
        free, total = gpusim.mem_get_info(self.index)
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {to_text(size)}. GPU {self.index} has a total "
            f"capacity of {to_text(total)} of which {to_text(free)} is free. "
            f"{to_text(int(self.fraction * total))} allowed; "
            f"Of the allocated memory {to_text(self.allocated)} is allocated by PyTorch, and "
            f"{to_text(self.reserved - self.allocated)} is reserved by PyTorch but unallocated."
        )
