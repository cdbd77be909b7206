"""What a worker reads of itself by NVML, for tests without a framework's counters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from simulator import Device, Machine

from .conftest import Project

GB, MB = 2**30, 2**20
NO_OLLAMA = ("--gpu-share", "--gpu-share-preset=no-ollama", "--gpu-share-report=report.json")

SHORT = """
    import time
    import gpusim
    import pytest

    @pytest.fixture
    def data():
        with gpusim.alloc("1GB"):
            yield

    @pytest.mark.parametrize("i", range(40))
    def test_short(data, i):
        time.sleep(0.05)

    def test_too_much(data):
        gpusim.alloc("30GB")
"""


def recorded(project: Project) -> dict[str, dict[str, Any]]:
    """Test's name -> what the JSON report says of it."""
    document = json.loads((project.path / "report.json").read_text())
    return {test["nodeid"].rpartition("::")[2]: test for test in document["tests"]}


def test_peaks_of_short_tests(project: Project, machine: Machine) -> None:
    """Tests that are over between two readings of the controller have a figure, as "at least"."""
    project.write(test_project=SHORT)
    result = project.pytest(*NO_OLLAMA, "-n1", "-v")
    assert (result.code, result.passed) == (1, 40), result.out
    tests = recorded(project)
    known = {name: test for name, test in tests.items() if test["peak_bytes"] is not None}
    # 16 readings a second, of tests of which there are less than 20 a second.
    assert len(known) >= 20
    held = GB + 600 * MB
    assert {(t["peak_bytes"], t["peak_source"], t["peak_exact"]) for t in known.values()} == {
        (held, "nvml", False)
    }
    # The one that ran out of memory is read at that moment, whatever was read before it.
    assert tests["test_too_much"]["peak_bytes"] == held
    assert "gw0 on GPU 0: VRAM peak at least 1.59 of" in result.out


@pytest.mark.parametrize("visible", ["own", "all"])
def test_several_devices(
    visible: str, project: Project, machine_with: Callable[..., Machine]
) -> None:
    """A worker reads its own device."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="24GB", used="2GB"))
    project.write(test_project=SHORT.replace("range(40)", "range(8)"))
    result = project.pytest(
        *NO_OLLAMA, "-n2", "--dist=each", "-o", f"gpu_share_visible_devices={visible}"
    )
    assert result.passed == 16, result.out
    peaks = {test["peak_bytes"] for test in recorded(project).values()}
    assert peaks <= {None, GB + 600 * MB}
    assert GB + 600 * MB in peaks
