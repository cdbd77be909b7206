"""A suite whose tests take simulated VRAM, for the pictures of the documentation."""

from __future__ import annotations

import time
from collections.abc import Callable

import gpusim
import pytest

STEPS = 4

_kept: list[gpusim.Allocation] = []


@pytest.fixture
def train() -> Callable[[float, float], None]:
    """Take so many GB, bit by bit as a training step does, for so many seconds."""

    def work(gigabytes: float, seconds: float) -> None:
        held = []
        for _ in range(STEPS):
            held.append(gpusim.alloc(f"{gigabytes / STEPS:.3f}GB"))
            time.sleep(seconds / STEPS / 4)
        time.sleep(seconds * 3 / 4)
        for allocation in held:
            allocation.free()

    return work


@pytest.fixture
def keep() -> Callable[[float], None]:
    """Take so many GB and forget to give them back."""

    def work(gigabytes: float) -> None:
        _kept.append(gpusim.alloc(f"{gigabytes:.3f}GB"))

    return work
