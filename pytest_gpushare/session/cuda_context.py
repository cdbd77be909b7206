"""What a CUDA context really costs here: measured at the end of a run, used by the next one.

A process holds its context, its modules and what its frameworks count. NVML tells the sum
for a process, where it tells anything, and the frameworks tell their part: the rest is what
no cap covers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_gpushare.units import MB

if TYPE_CHECKING:
    import pytest


CACHE_KEY = "gpushare/contexts"
"""Device name -> bytes, in pytest's cache."""

LOWEST, HIGHEST = 100 * MB, 1024 * MB
"""Bytes that a context may come to; beyond, something else was held at that moment."""


def measure(device: str) -> int | None:
    """Bytes of this process's context on the device of that UUID; None where nobody can tell.

    Imports no framework and brings CUDA up in none: without CUDA there is nothing to measure.
    NVML is opened here for a moment, in a process that has finished its tests.
    """
    counted = _counted_by_frameworks()
    if counted is None:
        return None
    from pytest_gpushare.gpu.nvml import Nvml

    nvml = Nvml()
    nvml.open()
    try:
        devices = nvml.read(None, None).all_devices
    finally:
        nvml.close()
    own = [
        process.used
        for found in devices
        if found.uuid == device
        for process in found.processes or ()
        if process.pid == os.getpid() and process.used is not None
    ]
    context = sum(own) - counted
    return context if own and LOWEST <= context <= HIGHEST else None


def known(config: pytest.Config) -> dict[str, int]:
    """Device name -> bytes, from earlier runs; what is not a sensible figure is left out."""
    cache = getattr(config, "cache", None)
    found = cache.get(CACHE_KEY, {}) if cache is not None else {}
    if not isinstance(found, dict):
        return {}
    return {
        name: size
        for name, size in found.items()
        if type(size) is int and LOWEST <= size <= HIGHEST
    }


def learn(config: pytest.Config, name: str, size: object) -> None:
    """Keep a measured context for the next run; of several the largest counts."""
    before = known(config)
    cache = getattr(config, "cache", None)
    if cache is None or type(size) is not int or not LOWEST <= size <= HIGHEST:
        return
    if size != before.get(name):
        cache.set(CACHE_KEY, {**before, name: size})


def _counted_by_frameworks(modules: Mapping[str, Any] = sys.modules) -> int | None:
    """Bytes that torch and CuPy hold; None where CUDA is down, or JAX counts for itself."""
    torch, cupy = modules.get("torch"), modules.get("cupy")
    if torch is None or "jax" in modules:
        return None
    try:
        if not torch.cuda.is_initialized():
            return None
        pool = cupy.get_default_memory_pool().total_bytes() if cupy is not None else 0
        return int(torch.cuda.memory_reserved()) + int(pool)
    except Exception:
        # A framework in an odd state at the end of a run is no reason to fail it.
        return None
