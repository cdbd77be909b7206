"""Twelve tests that need a GPU, as they would in a project with a neural network."""

import os
import time

import gpu_memory
import pytest

SIZE = os.environ.get("QUICKSTART_VRAM", "4GB")


@pytest.mark.parametrize("number", range(12))
def test_batch(number: int) -> None:
    """Work on a batch, in VRAM that the process keeps, as the caches of frameworks do."""
    block = gpu_memory.hold(SIZE)
    time.sleep(0.25)
    assert block.size > number
