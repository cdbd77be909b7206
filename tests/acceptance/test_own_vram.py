"""What a worker reads of itself by NVML, for tests without a framework's counters."""

from __future__ import annotations

import json
import re
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


def report(project: Project) -> dict[str, Any]:
    """The JSON report."""
    document: dict[str, Any] = json.loads((project.path / "report.json").read_text())
    return document


def recorded(project: Project) -> dict[str, dict[str, Any]]:
    """Test's name -> what the JSON report says of it."""
    return {test["nodeid"].rpartition("::")[2]: test for test in report(project)["tests"]}


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


BESIDE_TORCH = """
    import time
    import gpusim
    import torch

    def test_counted():
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")

    def test_both():
        held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        with gpusim.alloc("3GB"):
            time.sleep(2.5)
"""


@pytest.mark.parametrize("other", ["another library", "nothing"])
def test_a_library_that_no_framework_counts(other: str, project: Project, machine: Machine) -> None:
    """What torch counts is a lower bound once NVML has shown that the process holds more."""
    project.with_frameworks()
    text = BESIDE_TORCH if other != "nothing" else BESIDE_TORCH.replace("3GB", "1MB")
    project.write(test_project=text)
    result = project.pytest(*NO_OLLAMA, "-n1", "-v")
    assert (result.code, result.passed) == (0, 2), result.out
    tests, device = recorded(project), report(project)["devices"][0]
    is_exact = other == "nothing"
    assert tests["test_counted"]["peak_bytes"] == 2 * GB + 600 * MB
    assert [test["peak_exact"] for test in tests.values()] == [is_exact, False]
    assert (device["peak_used_exact"], device["peak_tests_exact"]) == (is_exact, is_exact)
    least = "" if is_exact else "at least "
    assert f"gpu-share: GPU 0 VRAM peak {least}" in result.out
    assert f"  gw0 on GPU 0: VRAM peak {least}" in result.out
    assert f"  VRAM {least}2.59 GB: test_project.py::test_counted" in result.out


def test_a_peak_between_two_samples(project: Project, machine: Machine) -> None:
    """What nobody counts may have been higher than every reading: the figures say so."""
    project.write(
        test_project="""
            import time
            import gpusim

            def test_short():
                with gpusim.alloc("1GB"):
                    time.sleep(1.5)
                with gpusim.alloc("8GB"):
                    time.sleep(0.01)
        """
    )
    result = project.pytest(*NO_OLLAMA, "-n1", "--gpu-share-report=report.html")
    assert result.code == 0, result.out
    (device,) = report(project)["devices"]
    assert (device["peak_used_exact"], device["peak_tests_exact"]) == (False, False)
    (line,) = (line for line in result.said if "VRAM peak" in line)
    assert re.search(r"VRAM peak at least \S+ of 24.0 GB, tests at least \S+ of 21.0 GB", line)
    page = re.sub("<[^>]+>", "", (project.path / "report.html").read_text(encoding="utf-8"))
    assert re.search(r"at least [\d.]+ GB of 24.0 GB at the peak", page)


def test_the_driver_is_open_before_a_test_may_start(project: Project, machine: Machine) -> None:
    """Nothing is loaded any more once the VRAM for a test is there: others wait for it, too."""
    project.write(
        conftest="""
            import pathlib, sys
            import pytest

            class Watch:
                @pytest.hookimpl(wrapper=True, trylast=True)
                def pytest_collection_finish(self, session):
                    yield
                    from pytest_gpushare.worker.runner import RunLoop

                    real = RunLoop._take

                    def take(loop, payload):
                        if payload["tests"] and loop._index < 0:
                            pathlib.Path("loaded.txt").write_text(
                                str("pytest_gpushare.gpu.nvml" in sys.modules)
                            )
                        real(loop, payload)

                    RunLoop._take = take

            def pytest_configure(config):
                if hasattr(config, "workerinput"):
                    config.pluginmanager.register(Watch())
        """,
        test_project="def test_one(): pass\ndef test_two(): pass\n",
    )
    result = project.pytest(*NO_OLLAMA, "-n1", "-o", "gpu_share_vram=* = 1GB")
    assert (result.code, result.passed) == (0, 2), result.out
    assert (project.path / "loaded.txt").read_text() == "True"
