"""`torch.cuda` on simulated VRAM: initialised lazily, with a caching allocator per device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gpusim

import torch

from .allocator import Allocator

OutOfMemoryError = torch.OutOfMemoryError
_allocators: list[Allocator] = []
_queued_calls: list[Callable[[], object]] = []


def is_available() -> bool:
    return gpusim.available()


def is_initialized() -> bool:
    return bool(_allocators)


def device_count() -> int:
    return gpusim.device_count() if gpusim.available() else 0


def init() -> None:
    _lazy_init()


def allocator(index: int) -> Allocator:
    _lazy_init()
    return _allocators[index]


def _lazy_init() -> None:
    if _allocators:
        return
    fraction = re.search(
        r"per_process_memory_fraction:([0-9.]+)",
        os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "",
    )
    try:
        # The context, on the first device alone: others get theirs when they are used.
        gpusim.alloc(0).free()
    except gpusim.OutOfMemoryError:
        raise RuntimeError("CUDA error: out of memory") from None
    _allocators.extend(
        Allocator(index, float(fraction.group(1)) if fraction else 1.0)
        for index in range(gpusim.device_count())
    )
    for call in _queued_calls:
        call()
    _queued_calls.clear()


def _lazy_call(call: Callable[[], object]) -> None:
    if is_initialized():
        call()
    else:
        _queued_calls.append(call)


def get_device_properties(device: int = 0) -> SimpleNamespace:
    _lazy_init()
    return SimpleNamespace(total_memory=gpusim.mem_get_info(device)[1], name="simulated")


def mem_get_info(device: int = 0) -> tuple[int, int]:
    _lazy_init()
    return gpusim.mem_get_info(device)


def set_per_process_memory_fraction(fraction: float, device: int | None = None) -> None:
    _lazy_init()
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    allocator(device or 0).fraction = fraction


def get_per_process_memory_fraction(device: int | None = None) -> float:
    return allocator(device or 0).fraction


def empty_cache() -> None:
    for each in _allocators:
        each.empty_cache()


def memory_stats_as_nested_dict(device: int = 0) -> dict[str, Any]:
    return _allocators[device].stats() if _allocators else {}


def reset_peak_memory_stats(device: int = 0) -> None:
    allocator(device).reset_peaks()


def memory_allocated(device: int = 0) -> int:
    return _allocators[device].allocated if _allocators else 0


def memory_reserved(device: int = 0) -> int:
    return _allocators[device].reserved if _allocators else 0


def max_memory_allocated(device: int = 0) -> int:
    return _allocators[device].peak_allocated if _allocators else 0


def max_memory_reserved(device: int = 0) -> int:
    return _allocators[device].peak_reserved if _allocators else 0
