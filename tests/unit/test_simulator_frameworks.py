"""The stand-ins of torch, CuPy and JAX behave as the real ones are documented to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.running import run

GB, MB = 1024**3, 1024**2
FRAMEWORKS = Path(__file__).parents[1] / "simulator" / "frameworks"
TORCH = """
import json, torch
GB, MB = 1024**3, 1024**2
cuda, out = torch.cuda, []
def take(size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")
def say():
    figures = (cuda.memory_allocated(), cuda.memory_reserved(), cuda.max_memory_allocated())
    out.append([figure // MB for figure in (*figures, cuda.max_memory_reserved())])
def refused(size):
    try:
        take(size)
    except torch.cuda.OutOfMemoryError as error:
        return str(error)
    return ""
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine.create(tmp_path / "vram", [Device(total="24GB", used="2GB")])


def inside(machine: Machine, code: str, **environment: str) -> Any:
    """What the code puts into `out`, run where the stand-ins are."""
    found = machine.env(FRAMEWORKS)["PYTHONPATH"]
    env = {"PYTHONPATH": f"{found}:{FRAMEWORKS}", **environment}
    return run(machine, f"{code}\nprint(json.dumps(out))", env=env)


def test_torch_keeps_what_is_freed(machine: Machine) -> None:
    """Reserved stays when tensors go; peaks are reset to what is there; empty_cache gives back."""
    found = inside(
        machine,
        TORCH
        + """
assert not cuda.is_initialized()
say()
a = take(1 * GB); say()
del a; say()
cuda.reset_peak_memory_stats(); say()
b = take(500 * MB); say()
cuda.empty_cache(); say()
del b; cuda.empty_cache(); say()
""",
    )
    assert found == [
        [0, 0, 0, 0],
        [1024, 1024, 1024, 1024],
        [0, 1024, 1024, 1024],
        [0, 1024, 0, 1024],
        [500, 1024, 500, 1024],
        # A segment of which part is in use stays whole.
        [500, 1024, 500, 1024],
        [0, 0, 500, 1024],
    ]


def test_torch_rounds_as_its_allocator_does(machine: Machine) -> None:
    """Blocks of 512 bytes; segments of 2 MB, 20 MB, or rounded to 2 MB; 1 MB is not split off."""
    found = inside(
        machine,
        TORCH
        + """
kept = [take(1)]; out.append([cuda.memory_allocated(), cuda.memory_reserved() // MB])
kept.append(take(2 * MB)); out.append([cuda.memory_allocated(), cuda.memory_reserved() // MB])
kept.append(take(19 * MB)); out.append([cuda.memory_allocated(), cuda.memory_reserved() // MB])
""",
    )
    assert found == [[512, 2], [512 + 2 * MB, 22], [512 + 22 * MB, 42]]


def test_torch_takes_its_share_and_no_more(machine: Machine) -> None:
    """By the variable and by the call; unused segments are given back before it gives up."""
    found = inside(
        machine,
        TORCH
        + """
a = take(5 * GB); del a
out.append(refused(6 * GB))
out.append(refused(5 * GB + 2 * MB))
cuda.set_per_process_memory_fraction(0.5)
out.append(refused(11 * GB))
cuda.set_per_process_memory_fraction(1.0)
out.append(refused(23 * GB))
out.append(cuda.mem_get_info()[0] // MB)
""",
        PYTORCH_ALLOC_CONF="per_process_memory_fraction:0.25",
    )
    assert found[0] == ""
    assert found[1] == ""
    assert found[2] == ""
    assert found[3].startswith("CUDA out of memory. Tried to allocate 23.00 GiB. GPU 0 has a total")
    assert found[4] == 22 * 1024 - 600
    assert inside(
        machine,
        TORCH + "out.append(refused(7 * GB))",
        PYTORCH_ALLOC_CONF="per_process_memory_fraction:0.25",
    )[0]


def test_torch_calls_what_is_queued_when_cuda_comes_up(machine: Machine) -> None:
    found = inside(
        machine,
        TORCH
        + """
cuda._lazy_call(lambda: out.append("called"))
out.append("before")
cuda.init()
cuda._lazy_call(lambda: out.append("at once"))
out.append(cuda.is_initialized())
""",
    )
    assert found == ["before", "called", "at once", True]


def test_cupy_and_jax(machine: Machine) -> None:
    """CuPy's pool gives back when told; JAX's never, and its peak only rises."""
    found = inside(
        machine,
        """
import json, cupy, jax
from jax._src import xla_bridge
GB, out = 1024**3, []
pool = cupy.get_default_memory_pool()
out.append([cupy.cuda.driver.ctxGetCurrent(), xla_bridge.backends_are_initialized()])
a = cupy.empty(2 * GB); del a
out.append([pool.used_bytes() // GB, pool.total_bytes() // GB])
pool.free_all_blocks()
out.append([pool.used_bytes() // GB, pool.total_bytes() // GB])
b = jax.ones(3 * GB); b.delete()
c = jax.ones(1 * GB)
stats = jax.devices()[0].memory_stats()
out.append([stats["bytes_in_use"] // GB, stats["peak_bytes_in_use"] // GB, stats["num_allocs"]])
for fails in (lambda: cupy.empty(30 * GB), lambda: jax.ones(30 * GB)):
    try:
        fails()
    except Exception as error:
        out.append([type(error).__module__, str(error)[:30]])
""",
    )
    assert found == [
        [0, False],
        [0, 2],
        [0, 0],
        [1, 3, 2],
        ["cupy.cuda.memory", "Out of memory allocating 32,21"],
        ["jaxlib.xla_extension", "RESOURCE_EXHAUSTED: Out of mem"],
    ]
