"""The example of `docs/reference/hooks.md`, run on made-up directories of an AMD driver."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from simulator import Machine

from .conftest import SHOW_PLACE, Project

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "own_devices"
GB = 1024**3


@pytest.fixture
def example(project: Project) -> Project:
    """The example's files, and two AMD GPUs of 16 GB and 8 GB, 1 GB of each in use."""
    (project.path / "test_project.py").unlink()
    for name in ("conftest.py", "pytest.ini", "test_device.py"):
        shutil.copy(EXAMPLE / name, project.path)
    for number, size in enumerate((16, 8)):
        folder = project.path / "sys" / f"card{number}" / "device"
        folder.mkdir(parents=True)
        (folder / "mem_info_vram_total").write_text(f"{size * GB}\n")
        (folder / "mem_info_vram_used").write_text(f"{GB}\n")
        (folder / "unique_id").write_text(f"{number + 10:016x}\n")
        (folder / "device").write_text("0x744c\n")
        # A connector of the card, which leads to the same files.
        (project.path / "sys" / f"card{number}-DP-1").mkdir()
        (project.path / "sys" / f"card{number}-DP-1" / "device").symlink_to(folder)
    return project


@pytest.fixture
def arguments() -> list[str]:
    """Where the example finds the made-up directories, and how many workers it gets."""
    return ["-o", "amd_sysfs=sys", "-n2"]


def test_example(example: Project, arguments: list[str]) -> None:
    """Without NVML the two AMD GPUs are the plan, and each worker sees its own."""
    result = example.pytest(*arguments)
    assert (result.code, result.workers, result.passed) == (0, 2, 4), result.out
    assert result.said[0].startswith("gpu-share: 2 GPU workers (1 × 14.0 GB, 1 × 6.0 GB) = 20.0 GB")
    assert "  GPU card0 AMD GPU 0x744c: total 16.0 GB, available 15.0 GB" in result.said
    example.write(test_device=SHOW_PLACE.replace('"CUDA_V', '"ROCR_V'))
    assert example.pytest(*arguments).code == 0
    places = example.places()
    assert set(places.values()) == {"gpu GPU-000000000000000a", "gpu GPU-000000000000000b"}


def test_last_word(example: Project, arguments: list[str]) -> None:
    """The example's hook on the plan makes the larger slot smaller, and tests see that."""
    result = example.pytest(*arguments, "-o", "most_vram_gb=6.5")
    assert (result.code, result.passed) == (0, 4), result.out
    assert result.said[0].startswith("gpu-share: 2 GPU workers (1 × 6.5 GB, 1 × 6.0 GB) = 12.5 GB")


def test_outer_visibility(example: Project, arguments: list[str]) -> None:
    """The example composes with the variable of its own devices."""
    result = example.pytest(*arguments, ROCR_VISIBLE_DEVICES="GPU-000000000000000b")
    assert (result.code, result.passed) == (0, 4), result.out
    assert [line.split()[1] for line in result.said if line.startswith("  GPU")] == ["card1"]


def test_beside_nvidia(example: Project, arguments: list[str], machine: Machine) -> None:
    """NVML's device stays in the plan beside the example's, and is the largest."""
    result = example.pytest(*arguments)
    assert (result.code, result.passed) == (0, 4), result.out
    seen = [line.split()[1] for line in result.said if line.startswith("  GPU")]
    assert sorted(seen) == ["0", "card0", "card1"]
    example.write(test_device=SHOW_PLACE)
    assert example.pytest(*arguments, "--dist=each").code == 0
    assert f"gpu {machine.snapshot()[0].uuid}" in example.places().values()


def test_without_any(example: Project, arguments: list[str]) -> None:
    """Where there is no device at all the example adds none, and the tests are skipped."""
    result = example.pytest("-o", "amd_sysfs=nowhere", "-n2")
    assert (result.code, result.passed) == (0, 0), result.out
    assert result.said[0].startswith("gpu-share: 2 CPU workers (no GPU: ")
    assert "4 skipped" in result.out


def test_deprecated_paths(example: Project, arguments: list[str]) -> None:
    """The example imports from paths of version 0.1: it runs as it is, with warnings."""
    result = example.pytest(*arguments, "-n1")
    assert (result.code, result.passed) == (0, 4), result.out
    for path in ("plan.model.Plan", "probe.facts.Device"):
        text = f"pytest_gpushare.{path} has moved: import it from pytest_gpushare"
        done = example.command(
            [sys.executable, "-W", "error", "-c", f"from pytest_gpushare.{path.rpartition('.')[0]} "
             f"import {path.rpartition('.')[2]}"]
        )  # fmt: skip
        assert done.code == 1
        assert f"DeprecationWarning: {text}" in done.err
