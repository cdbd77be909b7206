"""Processes that tests start: what outlives its test is VRAM that the next one cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from simulator import Device, Machine

from .conftest import Project

ONE = (
    *("--gpu-share", "--gpu-share-preset=no-ollama", "-n1", "--gpu-share-report=report.json"),
    *("-o", "gpu_share_pressure_timeout_s=20"),
)

CHILD = """
    import subprocess, sys, time
    import gpusim
    import pytest

    def start_child(seconds):
        code = (
            "import gpusim, time; held = gpusim.alloc('5GB'); print('up', flush=True); "
            f"time.sleep({seconds})"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"up\\n"
        return child
"""

LEFT = (
    CHILD
    + """
    @pytest.mark.gpu(vram="6GB")
    def test_leaves_a_child():
        start_child(2.5)
        time.sleep(0.3)

    @pytest.mark.gpu(vram="8GB")
    def test_next():
        with gpusim.alloc("7GB"):
            pass
"""
)

KEPT = (
    CHILD
    + """
    @pytest.fixture(scope="module")
    def server():
        child = start_child(60)
        yield
        child.kill()
        child.wait()

    @pytest.mark.gpu(vram="8GB")
    @pytest.mark.parametrize("i", range(3))
    def test_client(server, i):
        with gpusim.alloc("2GB"):
            pass
"""
)


def document(project: Project) -> dict[str, Any]:
    """The JSON report."""
    found: dict[str, Any] = json.loads((project.path / "report.json").read_text())
    return found


def test_the_next_test_waits_for_its_vram(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """11 GB are free, 5.6 of them held by a child of the test before: 7.6 GB do not fit."""
    machine = machine_with(Device(total="12GB", used="1GB"))
    project.write(test_project=LEFT)
    result = project.pytest(*ONE)
    assert (result.code, result.passed) == (0, 2), result.out
    assert machine.snapshot()[0].oom_count == 0
    pressure = [e["text"] for e in document(project)["events"] if e["kind"] == "pressure"]
    assert len(pressure) == 1
    assert "processes that tests of gw0 started 5.59 GB" in pressure[0]
    tests = {test["nodeid"].partition("::")[2]: test for test in document(project)["tests"]}
    assert tests["test_next"]["waited_s"] > 1


def test_what_a_fixture_keeps_is_part_of_the_need(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """The server of a module's fixture is in the need of its tests: none of them waits for it."""
    machine = machine_with(Device(total="12GB", used="1GB"))
    project.write(test_project=KEPT)
    result = project.pytest(*ONE)
    assert (result.code, result.passed) == (0, 3), result.out
    assert machine.snapshot()[0].oom_count == 0
    assert [e for e in document(project)["events"] if e["kind"] == "pressure"] == []
    assert max(test["waited_s"] for test in document(project)["tests"]) < 1
