"""The worked numbers of the sizing rule, each row run on the simulated library."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
from simulator import Device, Machine

from .conftest import Project, Result
from .in_one_process import Case, run_all

AGGRESSIVE_JSON = {
    "ollama_vram_reservation_mb": 11264,
    "max_workers_per_gb": 0.33,
    "min_vram_per_worker_gb": 2.5,
}


class Row(NamedTuple):
    """A machine, what the user wrote, and the plan that must come out."""

    devices: tuple[Device, ...]
    arguments: tuple[str, ...]
    headline: str
    workers: int
    json: dict[str, object] = {}  # noqa: RUF012 - never changed
    runs: bool = True


def card(total: str, free: str, **options: object) -> Device:
    """A device with this much free."""
    used = float(total[:-2]) - float(free[:-2])
    return Device(total=total, used=int(used * 2**30 + 0.5), **options)  # type: ignore[arg-type]


BIG = card("24GB", "22GB")
PAIR = (card("24GB", "23GB"), card("24GB", "23GB"))

ROWS = {
    "headline": Row(
        (BIG,),
        (),
        "2 GPU workers × 4.5 GB = 9.0 GB (limited by max_workers_per_gb; preset conservative)",
        2,
    ),
    "aggressive preset": Row(
        (BIG,),
        ("--gpu-share-preset", "aggressive"),
        "3 GPU workers × 3.33 GB = 10.0 GB (limited by max_workers_per_gb; preset aggressive)",
        3,
    ),
    "aggressive JSON": Row(
        (BIG,),
        (),
        "2 GPU workers × 5.0 GB = 10.0 GB (limited by max_workers_per_gpu; preset conservative)",
        2,
        AGGRESSIVE_JSON,
    ),
    "ultra-conservative": Row(
        (BIG,),
        ("--gpu-share-preset", "ultra-conservative"),
        "1 GPU worker × 7.0 GB = 7.0 GB "
        "(limited by min_vram_per_worker_gb; preset ultra-conservative)",
        1,
    ),
    "16 GB": Row(
        (card("16GB", "15GB"),),
        ("-o", "gpu_share_ollama_vram_reservation_mb=10240"),
        "1 GPU worker × 4.0 GB = 4.0 GB (limited by min_vram_per_worker_gb; preset conservative)",
        1,
    ),
    "10 GB": Row(
        (card("10GB", "9.5GB"),),
        ("-o", "gpu_share_ollama_vram_reservation_mb=8192", "--maxprocesses=2"),
        "2 CPU workers (insufficient VRAM per worker: 0.5 GB usable, 3.0 GB needed; "
        "gpu_share_min_vram_per_worker_gb)",
        2,
    ),
    "two devices": Row(
        PAIR,
        (),
        "4 GPU workers × 5.0 GB = 20.0 GB (limited by max_workers_per_gb; preset conservative)",
        4,
    ),
    "two devices, Ollama on the first": Row(
        PAIR,
        ("-o", "gpu_share_ollama_gpu=0"),
        "4 GPU workers (2 × 5.0 GB, 2 × 11.0 GB) = 32.0 GB "
        "(limited by max_workers_per_gb, max_workers_per_gpu; preset conservative)",
        4,
    ),
    "no-ollama": Row(
        (BIG,),
        ("--gpu-share-preset=no-ollama",),
        "7 GPU workers × 3.0 GB = 21.0 GB (limited by min_vram_per_worker_gb; preset no-ollama)",
        7,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, project: Project, machine_with: Callable[..., Machine]) -> None:
    """The headline tells the row's plan, and xdist is about to start that many workers."""
    row = ROWS[name]
    machine_with(*row.devices)
    text = json.dumps({"gpu_resource_management": row.json})
    files = {"performance_config.json": text} if row.json else {}
    case = Case(files, ("--gpu-share", *row.arguments))
    result = run_all({name: case}, project.path, project.environment)[name]
    assert result.said[0] == f"gpu-share: {row.headline}"
    assert (len(result.places), result.code) == (row.workers, 0)


def test_resident_ollama(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., object]
) -> None:
    """What Ollama holds is in `used` already: the same two workers as before it loaded."""
    machine_with(card("24GB", "22GB"))
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    result = project.pytest("--gpu-share")
    assert result.said == [
        "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB "
        "(limited by max_workers_per_gb; preset conservative)",
        "  GPU 0 NVIDIA GeForce RTX 3090 Ti: total 24.0 GB, available 11.2 GB",
        "  VRAM: Ollama reservation 12.0 GB (10.8 GB of it resident), safety buffer 1.0 GB, "
        "usable for tests 9.0 GB",
        f"  Ollama 0.33.0 at {project.environment['OLLAMA_HOST']}: "
        "qwen2.5:14b 10.8 GB, 100 % on GPU",
        "gpu-share: Ollama kept qwen2.5:14b on the GPU (10.8 GB, 100 %) throughout",
    ]
    assert (result.workers, result.code) == (2, 0)


def test_no_nvml(project: Project) -> None:
    """Without a driver the tests run all the same, on CPU workers."""
    result = project.pytest("--gpu-share", PYTEST_XDIST_AUTO_NUM_WORKERS="2")
    assert result.said[0] == (
        "gpu-share: 2 CPU workers "
        "(no GPU: NVML library not found: is the NVIDIA driver installed? (NVML error 12))"
    )
    assert (result.workers, result.passed, result.code) == (2, 4, 0)


def _refused(result: Result) -> str:
    assert (result.code, result.passed, "Traceback" in result.err) == (4, 0, False)
    return result.err.strip()


def test_constrained_without_fallback(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Fact, limit and remedy, and no test is run."""
    machine_with(card("24GB", "15GB"))
    result = project.pytest("--gpu-share", "-o", "gpu_share_fallback_to_cpu_when_constrained=false")
    assert _refused(result) == (
        "ERROR: gpu-share: a GPU worker needs 3.0 GB of VRAM, 2.0 GB are left; "
        "gpu_share_fallback_to_cpu_when_constrained is false: lower "
        "gpu_share_min_vram_per_worker_gb or gpu_share_ollama_vram_reservation_mb, free VRAM, "
        "or set it to true to run the tests on the CPU"
    )


@pytest.mark.parametrize("arguments", [(), ("-n", "0")])
def test_no_device_without_fallback(project: Project, arguments: tuple[str, ...]) -> None:
    """The same where there is no device at all."""
    result = project.pytest(
        "--gpu-share", *arguments, "-o", "gpu_share_fallback_to_cpu_when_constrained=false"
    )
    assert _refused(result) == (
        "ERROR: gpu-share: no GPU for the workers: NVML library not found: is the NVIDIA driver "
        "installed? (NVML error 12); gpu_share_fallback_to_cpu_when_constrained is false: "
        "set it to true to run the tests on the CPU"
    )


def test_no_process_is_let_in_without_fallback(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """The same where it is the device's compute mode."""
    machine_with(Device(total="24GB", used="2GB", compute_mode=2))
    result = project.pytest("--gpu-share", "-o", "gpu_share_fallback_to_cpu_when_constrained=false")
    assert _refused(result) == (
        "ERROR: gpu-share: no GPU for the workers: GPU 0: its compute mode PROHIBITED lets no "
        "process in; gpu_share_fallback_to_cpu_when_constrained is false: change the mode with "
        "nvidia-smi -c, or set it to true to run the tests on the CPU"
    )


def test_a_hook_without_fallback(project: Project, machine_with: Callable[..., Machine]) -> None:
    """The same where a hook took the slots away."""
    machine_with(card("24GB", "2GB"))
    project.file(
        "conftest.py",
        """
        from dataclasses import replace

        def pytest_gpushare_plan(plan):
            return replace(plan, slots=())
        """,
    )
    result = project.pytest("--gpu-share", "-o", "gpu_share_fallback_to_cpu_when_constrained=false")
    assert _refused(result) == (
        "ERROR: gpu-share: a pytest_gpushare_plan hook left no GPU worker; "
        "gpu_share_fallback_to_cpu_when_constrained is false: change the hook, or set it to true"
    )
