"""Which caps would hold, and which tools cannot read how devices are named."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_gpushare.cli.doctor.findings import Finding, look, ok
from pytest_gpushare.cli.doctor.gather import Examined
from pytest_gpushare.cli.doctor.packages import release
from pytest_gpushare.run.frameworks import installed
from pytest_gpushare.run.placement import caps_of

_FIRST_WITH_UUIDS = {"torch": (2, 0), "vllm": (0, 21), "deepspeed": (10**9,)}
"""Tool -> the first release that reads UUIDs in CUDA_VISIBLE_DEVICES; DeepSpeed has none yet."""


def caps(found: Examined) -> Iterator[Finding]:
    """What would keep each framework within a worker's share."""
    started = found.started
    frameworks = started.around.versions or installed()
    if not frameworks:
        yield ok("none of torch, JAX, CuPy and TensorFlow is installed: nothing to cap")
    elif not found.settings.cap_vram:
        origin = found.settings.origins.get("cap_vram", "default")
        yield look(
            "caps-off",
            f"gpu_share_cap_vram is false ({origin}): nothing keeps a worker within its share",
            "gpu_share_cap_vram = true",
        )
    elif not started.plan.slots:
        names = ", ".join(f"{name} {version}" for name, version in frameworks.items())
        yield ok(f"{names}: no GPU worker to cap")
    else:
        for told in caps_of(started.plan.slots[0], started.around).told:
            yield _cap(told)


def tools(found: Examined) -> Iterator[Finding]:
    """Tools that break on UUIDs."""
    if found.settings.device_names != "uuid":
        return
    for name, first in _FIRST_WITH_UUIDS.items():
        version = found.packages.get(name)
        if version is not None and release(version) < first:
            yield look(
                "uuid-tools",
                f"{name} {version} expects numbers in CUDA_VISIBLE_DEVICES, and workers are given "
                "UUIDs",
                "gpu_share_device_names = index",
            )


def _cap(told: str) -> Finding:
    """`torch 2.13.0: 3.91 GB`, or `JAX 0.10.0: no cap (allocator platform)`."""
    if "no cap" not in told:
        return ok(told)
    variable = (
        "XLA_PYTHON_CLIENT_ALLOCATOR"
        if told.startswith("JAX")
        else "the backend in PYTORCH_ALLOC_CONF"
    )
    return look("no-cap", told, f"unset {variable}; else give tests more room: fewer workers")
