"""What a CUDA context costs, against the allowance that caps leave for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_gpushare.planning.caps import CONTEXT_ALLOWANCE

from .conftest import MB, Project, needs

MEASURE = """
    import os, pynvml
    import inside

    pynvml.nvmlInit()
    # NVML knows full UUIDs only, which is what the variable holds here.
    HANDLE = pynvml.nvmlDeviceGetHandleByUUID(os.environ["CUDA_VISIBLE_DEVICES"])

    def free():
        return pynvml.nvmlDeviceGetMemoryInfo(HANDLE).free

    def used():
        # In a container the list may have the host's PIDs: what is new in it is ours.
        try:
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(HANDLE)
        except pynvml.NVMLError:
            return {}
        return {p.pid: p.usedGpuMemory for p in listed}

    listed, before = used(), free()

    def tell(reserved, **more):
        now = used()
        ours = [now[pid] for pid in now if pid not in listed]
        alone = ours[0] if len(ours) == 1 else None
        inside.note(by_process=alone, by_free=before - free(), reserved=reserved, **more)
"""
DRIVER = """
    context = inside.Context()
    tell(0)
"""
TORCH = """
    import torch
    tensor = torch.ones(1024, device="cuda")
    torch.cuda.synchronize()
    tell(torch.cuda.memory_reserved())
"""
TORCH_AT_WORK = """
    import torch
    tensor = torch.rand(1024, 1024, device="cuda")
    image = torch.rand(1, 8, 64, 64, device="cuda")
    kernel = torch.rand(8, 8, 3, 3, device="cuda")
    (tensor @ tensor).sum().item()
    torch.nn.functional.conv2d(image, kernel).sum().item()
    torch.cuda.synchronize()
    tell(torch.cuda.memory_reserved())
"""
CUPY = """
    import cupy
    array = cupy.ones(1024)
    cupy.cuda.Device().synchronize()
    tell(cupy.get_default_memory_pool().total_bytes())
"""


@pytest.mark.parametrize(
    ("code", "module"),
    [(DRIVER, None), (TORCH, "torch"), (TORCH_AT_WORK, "torch"), (CUPY, "cupy")],
    ids=["driver", "torch, 4 kB", "torch, matmul and convolution", "cupy, 8 kB"],
)
def test_context(
    code: str, module: str | None, project: Project, figure: Callable[[str], None]
) -> None:
    """A process takes no more beside its framework's own memory than the allowance."""
    if module:
        needs(module)
    note = project.python(MEASURE + code).passed().note
    by_free = note["by_free"] - note["reserved"]
    # Containers and WSL are told None or 0: unknown.
    by_process = note["by_process"] - note["reserved"] if note["by_process"] else None
    told = "not told" if by_process is None else f"{by_process / MB:.0f} MB"
    figure(f"{told} by NVML's process list, {by_free / MB:.0f} MB by the device's free VRAM")
    cost = by_free if by_process is None else by_process
    assert 0 < cost <= CONTEXT_ALLOWANCE
