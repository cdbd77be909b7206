"""GPU and CPU tests in one pool: who runs what, in which order, with which fixtures."""

from __future__ import annotations

from pathlib import Path

from simulator import Machine

from .conftest import Project

# Each test writes down where it ran; GPU tests hold VRAM meanwhile.
POOL = """
    import os, pathlib, time
    import gpusim
    import pytest

    def note(name):
        with open("log.txt", "a") as log:
            print(name, os.environ["PYTEST_GPUSHARE_ROLE"], file=log)

    @pytest.mark.parametrize("i", range(12))
    def test_cpu(i):
        note(f"cpu{i}")
        time.sleep(0.02)

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(6))
    def test_gpu(i):
        with gpusim.alloc("3GB"):
            note(f"gpu{i}")
            time.sleep(0.05)
"""


def log_of(project: Project) -> list[list[str]]:
    """The words of each line that the tests wrote."""
    return [line.split() for line in Path(project.path, "log.txt").read_text().splitlines()]


def test_routing(project: Project, machine: Machine) -> None:
    """Marked tests run on GPU workers; every test runs once."""
    project.write(test_project=POOL)
    result = project.pytest("--gpu-share", "-o", "gpu_share_cpu_workers=2", "-v")
    assert (result.code, result.passed, result.workers) == (0, 18, 4), result.out
    assert result.said[0].startswith("gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB, 2 CPU workers")
    lines = log_of(project)
    assert len(lines) == len({name for name, _ in lines}) == 18
    assert {role for name, role in lines if name.startswith("gpu")} == {"gpu"}
    assert machine.snapshot()[0].oom_count == 0
