"""Leases of a process that runs the tests itself: one test after the other, each with its need."""

from __future__ import annotations

import subprocess
import time

import pytest
from acceptance.conftest import Project
from acceptance.sessions import records, sizes, wait_for
from inner_pytest import inner_command
from simulator import Machine
from simulator.child import child_process

from pytest_gpushare.report.reading import read_report


@pytest.mark.parametrize("asking", ["-n0", "--pdb"])
def test_without_workers_each_test_leases(project: Project, machine: Machine, asking: str) -> None:
    """A test leases its need while it runs, and waits for that of another session."""
    project.write(
        test_project="""
            import pathlib, pytest, gpusim

            def leased():
                import json, os
                (path,) = pathlib.Path(os.environ["PYTEST_GPUSHARE_LEASES"]).glob(
                    f"s-{os.getpid()}-*")
                return [s[0] for s in json.loads(path.read_text())["devices"].values()]

            @pytest.fixture(scope="session")
            def held():
                return gpusim.alloc("1GB")

            @pytest.mark.gpu(vram="5GB")
            def test_declared(held):
                assert leased() == [5 * 2**30]

            @pytest.mark.gpu(vram="2GB")
            def test_smaller(held):
                assert leased() == [2 * 2**30]

            def test_unmarked():
                assert leased() == [21 * 2**30]
        """
    )
    result = project.pytest("--gpu-share", asking, "-o", "gpu_share_preset=no-ollama")
    assert result.passed == 3, result.out
    assert records(project) == []
    project.write(
        test_project="""
            import pathlib, os, pytest, subprocess, sys, time

            @pytest.fixture(scope="session")
            def other():
                hold = [sys.executable, "-m", "pytest_gpushare", "hold", "--vram", "18GB", "--"]
                process = subprocess.Popen([*hold, "sleep", "30"])
                directory = pathlib.Path(os.environ["PYTEST_GPUSHARE_LEASES"])
                until = time.monotonic() + 20
                while not list(directory.glob(f"s-{process.pid}-*")):
                    assert time.monotonic() < until
                    time.sleep(0.01)
                yield
                process.terminate()
                process.wait(20)

            @pytest.mark.gpu(vram="1GB")
            def test_first(other):
                pass

            @pytest.mark.gpu(vram="5GB")
            def test_second(other):
                pass
        """
    )
    report = project.path / "r.json"
    result = project.pytest(
        *("--gpu-share", asking, "--gpu-share-wait=1", f"--gpu-share-report={report}"),
        *("-o", "gpu_share_preset=no-ollama"),
    )
    assert "5.0 GB of VRAM is leased by other sessions, waited 1 s: pid" in result.out
    assert "ERROR test_project.py::test_second" in result.out
    assert result.passed == 1
    first, second = (test["waited_s"] for test in read_report(report)["tests"])
    assert first < 0.5
    assert 1 <= second < 30


def test_lease_of_a_test_in_the_debugger(project: Project, machine: Machine) -> None:
    """It has its VRAM for as long as somebody looks at it, and no longer."""
    project.write(
        test_project="""
            import pytest

            @pytest.mark.gpu(vram="5GB")
            def test_fails():
                assert False

            @pytest.mark.gpu(vram="2GB")
            def test_waits():
                breakpoint()
        """
    )

    def leased() -> list[int]:
        return [size for record in records(project) for size in sizes(record)]

    command = inner_command("--gpu-share", "--pdb", "-o", "gpu_share_preset=no-ollama")
    with child_process(
        command,
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        for size in (5, 2):
            wait_for(lambda size=size: leased() == [size * 1024**3])
            time.sleep(0.3)
            assert leased() == [size * 1024**3]
            process.stdin.write(b"continue\n")
            process.stdin.flush()
        output, _ = process.communicate(timeout=60)
    assert b"1 failed, 1 passed" in output
    assert records(project) == []
