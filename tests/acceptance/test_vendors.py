"""Another vendor's GPUs: `toy_vendor.py`, registered by its line, alone and beside NVIDIA's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine

from .conftest import Project

MB, GB = 2**20, 2**30
REGISTERED = """
    from pytest_gpushare.gpu import vendors

    vendors.VENDORS = (*vendors.VENDORS, "toy_vendor:TOY")
"""
TESTS = """
    import os, pathlib, time
    import pytest

    VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

    @pytest.mark.parametrize("i", range(2))
    def test_place(i, worker_id, gpu_share):
        seen = [os.environ.get(name, "unset") for name in VARIABLES]
        place = [str(gpu_share.device), *seen, os.environ.get("CUPY_GPU_MEMORY_LIMIT", "")]
        pathlib.Path(f"place-{worker_id}").write_text(";".join(place))
        if gpu_share.role == "gpu" and seen[1]:
            held = pathlib.Path(os.environ["TOY_GPUS"], f"held-{os.getpid()}")
            new = held.with_name(f"new-{os.getpid()}")
            new.write_text(f"{seen[1]} {2**31}")
            new.rename(held)
            until = time.monotonic() + 60
            # Both workers of the device hold theirs before either goes on.
            while sum(f.read_text().startswith(seen[1]) for f in held.parent.glob("held-*")) < 2:
                assert time.monotonic() < until
                time.sleep(0.05)
        time.sleep(1.5)
"""
HOLD = """
    import sys
    import toy_registered
    from pytest_gpushare.cli.main import main

    sys.exit(main())
"""


@pytest.fixture
def toy(project: Project, tmp_path: Path) -> Project:
    """A project on a machine with two toy GPUs, of 24 and 12 GB, and no NVML."""
    folder = tmp_path / "toy"
    folder.mkdir()
    cards = [("Toy 24", 24 * GB, 2 * GB), ("Toy 12", 12 * GB, GB)]
    (folder / "devices.json").write_text(json.dumps(cards))
    project.environment["TOY_GPUS"] = str(folder)
    project.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "8"
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    project.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    project.write(toy_registered=REGISTERED, test_project=TESTS, command=HOLD)
    return project


def run(project: Project, *arguments: str, **environment: str) -> tuple[list[str], dict[str, Any]]:
    """What the plugin printed, and the JSON report, of a run in which each worker has each test."""
    result = project.pytest(
        *("-p", "toy_registered", "--gpu-share", "--gpu-share-report=r.json", "--dist=each"),
        *("-o", "gpu_share_enable_ollama_detection=false", "-o", "gpu_share_ollama_gpu=none"),
        *arguments,
        **environment,
    )
    assert result.code == 0, result.out
    return result.said, json.loads((project.path / "r.json").read_text(encoding="utf-8"))


def places(project: Project) -> Counter[tuple[str, ...]]:
    """UUID, the two variables, and CuPy's limit, of each worker."""
    return Counter(tuple(path.read_text().split(";")) for path in project.path.glob("place-*"))


def test_alone(toy: Project) -> None:
    """Sized by its VRAM; each worker is shown its device, and what it holds is attributed to it."""
    said, report = run(toy)
    assert said[:4] == [
        "gpu-share: 4 GPU workers (2 × 10.5 GB, 2 × 5.0 GB) = 31.0 GB (limited by "
        "max_workers_per_gb, max_workers_per_gpu; preset conservative)",
        "  --dist=each: every test runs on each of the 4 workers: use --dist=load to share them "
        "out",
        "  GPU toy0 Toy 24: total 24.0 GB, available 22.0 GB",
        "  VRAM of GPU toy0: Ollama reservation 0.0 GB, safety buffer 1.0 GB, usable "
        "for tests 21.0 GB",
    ]
    # Only CuPy's cap holds there: the slot, less a context.
    assert places(toy) == {
        ("TOY-0", "", "0", str(10 * GB + GB // 2 - 600 * MB)): 2,
        ("TOY-1", "", "1", str(5 * GB - 600 * MB)): 2,
    }
    assert (report["run"]["driver"], len(report["problems"])) == ("toy 1.0", 1)
    first, second = report["devices"]
    assert (first["peak_workers_bytes"], second["peak_workers_bytes"]) == (4 * GB, 4 * GB)
    assert (first["peak_used_bytes"], second["peak_used_bytes"]) == (6 * GB, 5 * GB)
    assert {(w["device"], w["peak_bytes"]) for w in report["workers"]} == {
        ("TOY-0", 2 * GB),
        ("TOY-1", 2 * GB),
    }


def test_the_users_choice_bounds_the_plan(toy: Project) -> None:
    """A conftest that hides devices from its own process does not."""
    toy.write(conftest='import os\nos.environ["HIP_VISIBLE_DEVICES"] = "0"\n')
    _, report = run(toy, HIP_VISIBLE_DEVICES="1")
    assert {worker["device"] for worker in report["workers"]} == {"TOY-1"}
    assert [w["slot_bytes"] for w in report["workers"]] == [5 * GB, 5 * GB]


def test_workers_with_devices_of_the_user(toy: Project) -> None:
    """The variable counts as NVIDIA's does where `--tx` sets it."""
    result = toy.pytest(
        *("-p", "toy_registered", "--gpu-share", "--dist=each"),
        *("--tx", "popen//env:HIP_VISIBLE_DEVICES=1"),
    )
    assert result.code == 0, result.out
    assert "the workers of --tx have devices of your own" in result.out


def test_beside_nvidia(toy: Project, machine_with: Callable[..., Machine]) -> None:
    """One plan for both; a worker sees its own device and nothing of the other vendor."""
    path = toy.environment["PYTHONPATH"]
    machine_with(Device(total="24GB", used="2GB"))
    toy.environment["PYTHONPATH"] = os.pathsep.join([path, toy.environment["PYTHONPATH"]])
    _, report = run(toy)
    nvidia = report["devices"][0]["uuid"]
    assert {place[:3]: number for place, number in places(toy).items()} == {
        (nvidia, nvidia, ""): 2,
        ("TOY-0", "", "0"): 2,
        ("TOY-1", "", "1"): 2,
    }
    assert report["run"]["driver"] == "580.95.05, toy 1.0"
    assert [d["peak_workers_bytes"] for d in report["devices"]] == [None, 4 * GB, 4 * GB]
    assert len(report["problems"]) == 1


def test_commands(toy: Project) -> None:
    """`hold` shows its command the device, and `doctor` checks what is there."""
    show = "import os; print(os.environ['HIP_VISIBLE_DEVICES'])"
    held = toy.command(
        [
            *(sys.executable, "command.py", "hold", "--device", "toy1", "--vram", "4GB"),
            *("--wait", "0", "--", sys.executable, "-c", show),
        ]
    )
    assert (held.code, held.out) == (0, "1\n"), held.err
    found = toy.command([sys.executable, "command.py", "doctor"]).out
    assert "driver toy 1.0, toy library 1.0" in found
    assert "GPU toy1 Toy 12 (TOY-1): total 12.0 GB" in found
    assert "HIP_VISIBLE_DEVICES is not set: every device counts" in found


def test_neither(toy: Project, tmp_path: Path) -> None:
    """Why there is no device is said for each vendor."""
    (tmp_path / "toy" / "devices.json").unlink()
    _, report = run(toy, "-n1")
    assert re.fullmatch(
        r"NVML library not found.*; toy library not found: .*devices.json'",
        report["plan"]["absence"],
    )
