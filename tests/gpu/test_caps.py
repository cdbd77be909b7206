"""Caps that bite: what fits the slot is had, what does not is refused though VRAM is free."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pytest_gpushare.gpu.host import mps_is_running

from .conftest import MB, Project, Result, needs

HEAD = """
    import inside
    import pytest_gpushare

    SLOT = pytest_gpushare.current().vram
    INSIDE = (SLOT - 600 * 1024**2) * 3 // 4
    BEYOND = SLOT
"""
"""What every test file of this module begins with."""

TORCH = """
    import torch

    def take(size):
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def test_cap():
        part = take(INSIDE)
        del part
        torch.cuda.empty_cache()
        # Else the refusal would prove only that the device is full.
        room = torch.cuda.mem_get_info()[0]
        assert room > BEYOND
        refused = ""
        try:
            take(BEYOND)
        except torch.cuda.OutOfMemoryError as error:
            refused = str(error)
        inside.note(slot=SLOT, room=room, refused=refused)
"""
JAX = """
    import jax

    def take(size):
        return jax.numpy.ones(size, dtype="uint8").block_until_ready()

    def test_cap():
        assert jax.devices()[0].platform == "gpu"
        part = take(INSIDE)
        part.delete()
        limit = jax.devices()[0].memory_stats()["bytes_limit"]
        room = inside.Context().free()
        assert room > BEYOND
        refused = ""
        try:
            take(BEYOND)
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        inside.note(slot=SLOT, room=room, limit=limit, refused=refused)
"""
CUPY = """
    import cupy

    def test_cap():
        part = cupy.empty(INSIDE, dtype="uint8")
        del part
        cupy.get_default_memory_pool().free_all_blocks()
        room = cupy.cuda.Device().mem_info[0]
        assert room > BEYOND
        refused = ""
        try:
            cupy.empty(BEYOND, dtype="uint8")
        except cupy.cuda.memory.OutOfMemoryError as error:
            refused = str(error)
        inside.note(slot=SLOT, room=room, refused=refused)
"""
TENSORFLOW = """
    import tensorflow as tf

    def take(size):
        with tf.device("GPU:0"):
            return tf.zeros([size], dtype=tf.uint8)

    def test_cap():
        assert tf.config.list_physical_devices("GPU")
        take(INSIDE)
        room = inside.Context().free()
        refused = ""
        try:
            take(BEYOND)
        except tf.errors.ResourceExhaustedError as error:
            refused = str(error)
        inside.note(slot=SLOT, room=room, refused=refused)
"""
DRIVER = """
    def test_cap():
        context = inside.Context()
        room = context.free()
        refused = ""
        try:
            context.take(BEYOND)
        except inside.CudaError as error:
            assert error.code == inside.OUT_OF_MEMORY
            refused = str(error)
        inside.note(slot=SLOT, room=room, refused=refused)
"""


def cap(project: Project, body: str, *arguments: str, **changes: str) -> Result:
    """Run in the first of two slots, so that the device has room beyond it."""
    return project.pytest(HEAD + body, "-n2", *arguments, **changes)


def told(result: Result) -> str:
    """The figure of a cap that bit."""
    note = result.note
    return f"{note['slot'] // MB} MB refused, {note['room'] // MB} MB free"


def test_torch(project: Project, figure: Callable[[str], None]) -> None:
    """Torch gets three quarters of its cap, and OutOfMemoryError for a whole slot."""
    needs("torch")
    result = cap(project, TORCH).passed()
    assert "out of memory" in result.note["refused"]
    figure(told(result))


def test_torch_with_settings_of_its_own(project: Project, figure: Callable[[str], None]) -> None:
    """The cap of torch bites beside a setting of the user's in the same variable."""
    needs("torch")
    result = cap(project, TORCH, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True").passed()
    assert "out of memory" in result.note["refused"]
    figure(told(result))


def test_torch_uncapped(project: Project) -> None:
    """With gpu_share_cap_vram=false torch gets what was refused before."""
    needs("torch")
    result = cap(project, TORCH, "-o", "gpu_share_cap_vram=false").passed()
    assert result.note["refused"] == ""


def test_torch_without_workers(project: Project) -> None:
    """The cap of torch bites in a process that was placed without workers."""
    needs("torch")
    # The one slot is the whole budget: a larger safety buffer leaves room beyond it.
    half = f"gpu_share_safety_buffer_mb={project.card.free * 6 // 10 // MB}"
    result = project.pytest(HEAD + TORCH, "-n0", "-o", half).passed()
    assert "out of memory" in result.note["refused"]


def test_jax(project: Project, figure: Callable[[str], None]) -> None:
    """JAX gets three quarters of its cap, and an error for a whole slot."""
    needs("jax")
    result = cap(project, JAX).passed()
    note = result.note
    assert "RESOURCE_EXHAUSTED" in note["refused"]
    assert note["limit"] <= note["slot"]
    figure(f"{told(result)}; JAX's own limit is {note['limit'] // MB} MB")


def test_cupy(project: Project, figure: Callable[[str], None]) -> None:
    """CuPy gets three quarters of its cap, and OutOfMemoryError for a whole slot."""
    needs("cupy")
    result = cap(project, CUPY).passed()
    assert "Out of memory" in result.note["refused"]
    figure(told(result))


def test_tensorflow(project: Project, figure: Callable[[str], None]) -> None:
    """TensorFlow gets three quarters of its cap, and ResourceExhaustedError for a whole slot."""
    needs("tensorflow")
    result = cap(project, TENSORFLOW).passed()
    assert result.note["refused"]
    figure(told(result))


def test_mps(project: Project, figure: Callable[[str], None]) -> None:
    """Under CUDA MPS the driver itself refuses a whole slot."""
    if not mps_is_running(os.environ):
        pytest.skip("the control daemon of CUDA MPS does not run")
    result = cap(project, DRIVER).passed()
    assert result.note["refused"]
    figure(told(result))


def test_driver_is_not_capped(project: Project) -> None:
    """Without CUDA MPS no cap holds the driver API, as the documentation says."""
    if mps_is_running(os.environ):
        pytest.skip("the control daemon of CUDA MPS runs")
    result = cap(project, DRIVER).passed()
    assert result.note["refused"] == ""
