"""What a run advises: it helps where it is followed, and no lack of VRAM goes unsaid."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from simulator import Device, Machine
from simulator.child import child_process

from .conftest import Project, Result

# The fall-back starts as many CPU workers as there are CPUs.
NO_OLLAMA = {"OLLAMA_HOST": "127.0.0.1:9", "PYTEST_XDIST_AUTO_NUM_WORKERS": "2"}
REPORTS = ("--gpu-share-report=r.json", "--gpu-share-report=r.html")


def page(project: Project) -> str:
    text = (project.path / "r.html").read_text(encoding="utf-8")
    return re.sub(r"<[^>]+>", " ", text.partition("<main>")[2])


def test_gpu_tests_on_cpu_workers(project: Project, machine_with: Callable[..., Machine]) -> None:
    """They fail for want of VRAM: said why, with a reservation that gives them a GPU worker."""
    machine_with(Device(total="10GB", used="0.5GB"))
    project.write(
        test_project="""
            import os
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(4))
            def test_gpu(i):
                assert os.environ["CUDA_VISIBLE_DEVICES"]
        """
    )
    result = project.pytest("--gpu-share", "-n2", *REPORTS, **NO_OLLAMA)
    assert result.code == 1
    why = (
        "4 GPU tests failed on CPU workers, which see no GPU (insufficient VRAM per worker: "
        "0.0 GB usable, 3.0 GB needed; gpu_share_min_vram_per_worker_gb)"
    )
    # The last line ends with the best advice, which no hint repeats.
    (last,) = (line for line in result.said if line.startswith(f"gpu-share: {why}: "))
    assert "-o gpu_share_ollama_vram_reservation_mb=5632" in last
    hints = [line.partition("hint: ")[2] for line in result.said if "hint: " in line]
    assert not any("5632" in hint for hint in hints)
    assert "-o gpu_share_without_gpu=skip would skip such tests" in hints[-1]
    report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    assert report["shortages"] == [why]
    best, *others = report["hints"]
    assert "-o gpu_share_ollama_vram_reservation_mb=5632" in best
    assert others == hints
    assert "4 GPU tests failed on CPU workers" in page(project)
    assert "no better setting was found" not in page(project)
    options = re.findall(r"-o (\S+)", last)
    again = project.pytest("--gpu-share", "-n2", *(f"-o{o}" for o in options), **NO_OLLAMA)
    assert again.said[0].startswith("gpu-share: 1 GPU worker × 3.0 GB"), again.out
    assert again.passed == 4
    skipped = project.pytest("--gpu-share", "-n1", "-ogpu_share_without_gpu=skip", **NO_OLLAMA)
    assert skipped.code == 0, skipped.out


def test_unmarked_tests_on_cpu_workers(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Where no test is marked, those that failed count; a run that passed lacked nothing."""
    machine_with(Device(total="10GB", used="0.5GB"))
    project.write(
        test_project="""
            import os

            def test_gpu():
                assert os.environ["CUDA_VISIBLE_DEVICES"]

            def test_cpu():
                pass
        """
    )
    result = project.pytest("--gpu-share", "-n2", *REPORTS, **NO_OLLAMA)
    assert result.code == 1
    why = (
        "1 test failed on CPU workers, which see no GPU (insufficient VRAM per worker: "
        "0.0 GB usable, 3.0 GB needed; gpu_share_min_vram_per_worker_gb)"
    )
    (last,) = (line for line in result.said if line.startswith(f"gpu-share: {why}: "))
    assert "-o gpu_share_ollama_vram_reservation_mb=5632" in last
    assert "no better setting was found" not in page(project)
    passed = project.pytest("--gpu-share", "-n2", "-k", "cpu", **NO_OLLAMA)
    assert passed.code == 0, passed.out
    assert "which see no GPU" not in passed.out


def test_idle_device(project: Project, machine_with: Callable[..., Machine]) -> None:
    """A second GPU is idle as nobody knows which one Ollama uses: saying so gives it work."""
    machine_with(Device(total="16GB", used="12GB"), Device(total="12GB", used="0.5GB"))
    project.write(test_project="import pytest\n\n@pytest.mark.gpu\ndef test_gpu(): pass\n")
    result = project.pytest("--gpu-share", **NO_OLLAMA)
    (hint,) = (line for line in result.said if "gpu_share_ollama_gpu=0" in line)
    assert "Ollama's device is unknown" in hint
    again = project.pytest("--gpu-share", "-o", "gpu_share_ollama_gpu=0", **NO_OLLAMA)
    assert again.said[0].startswith("gpu-share: 2 GPU workers "), again.out


def test_more_than_declared(project: Project, machine: Machine) -> None:
    """A test that declares 3 GB and holds 9 is named; one that holds its 6 GB is not."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.gpu(vram="3GB")
            def test_liar():
                held = gpusim.alloc("8GB")
                time.sleep(2.5)
                held.free()

            @pytest.mark.gpu(vram="6GB")
            def test_honest():
                held = gpusim.alloc("5GB")
                time.sleep(2.5)
                held.free()
        """
    )
    result = project.pytest("--gpu-share", *REPORTS, **NO_OLLAMA)
    assert result.code == 0, result.out
    (line,) = (line for line in result.said if "its need was" in line)
    assert re.fullmatch(
        r"gpu-share: test_project.py::test_liar held at least 8\.\d+ GB of VRAM, its need was "
        r"3.0 GB: declare vram=9GB",
        line,
    )
    assert "test_honest" not in "\n".join(result.said)


def test_step_summary(project: Project, machine_with: Callable[..., Machine]) -> None:
    """The job's page has the same advice."""
    machine_with(Device(total="10GB", used="0.5GB"))
    project.write(test_project="import pytest\n\n@pytest.mark.gpu\ndef test_gpu(): assert 0\n")
    summary = Path(project.path / "summary.md")
    project.pytest("--gpu-share", GITHUB_STEP_SUMMARY=str(summary), **NO_OLLAMA)
    text = summary.read_text(encoding="utf-8").replace("&#95;", "_")
    assert "reservation_mb=5632" in text
    assert "1 GPU test failed on CPU workers" in text


def test_share_of_the_tests(project: Project, machine: Machine) -> None:
    """What rose between two process lists is the tests' too, unattributed where it must be."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.parametrize("i", range(12))
            def test_short(i):
                held = gpusim.alloc("3GB")
                time.sleep(0.3)
                held.free()
                time.sleep(0.2)
        """
    )
    result = project.pytest("--gpu-share", *REPORTS, **NO_OLLAMA)
    assert result.code == 0, result.out
    report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    (device,) = report["devices"]
    rise = device["peak_used_bytes"] - device["used_at_start_bytes"]
    # Nobody else took anything: all of the rise is the tests'.
    assert device["peak_tests_bytes"] >= 0.99 * rise
    workers = device["peak_workers_bytes"] or 0
    assert device["peak_unattributed_bytes"] == device["peak_tests_bytes"] - workers
    (line,) = (line for line in result.said if "VRAM peak" in line)
    held = float(re.search(r"tests (?:at least )?([\d.]+) of 9.0 GB", line)[1])  # type: ignore[index]
    assert held * 2**30 >= 0.99 * rise - 2**28
    assert ("unattributed" in line) is (workers < 0.95 * device["peak_tests_bytes"])
    assert sum(test["peak_exact"] is True for test in report["tests"]) == 0


def test_one_figure_of_ollama(
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., object],
) -> None:
    """Where NVML lists foreign PIDs, the header, the samples and the page go by `/api/ps`."""
    machine_with(Device(total="24GB", used="1GB", pid_offset=1_000_000))
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    project.write(test_project="import time\n\ndef test_a(): time.sleep(1.5)\n")
    result = project.pytest("--gpu-share", "-n1", *REPORTS)
    assert result.code == 0, result.out
    report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    (device,), (samples,) = report["devices"], report["samples"]["devices"].values()
    resident = device["resident_bytes"]
    assert abs(resident - 10.8 * 2**30) < 2**28
    known = [size for size in samples["ollama_bytes"] if size is not None]
    assert len(known) > len(samples["at_s"]) / 2
    assert all(abs(size - resident) < 2**28 for size in known)
    bar = re.search(r'aria-label="([^"]* of 24.0 GB)"', (project.path / "r.html").read_text())
    assert bar is not None
    held = re.search(r"Ollama ([\d.]+) GB", bar[1])
    assert held is not None, bar[1]
    assert abs(float(held[1]) * 2**30 - resident) < 2**28, bar[1]
    others = re.search(r"others ([\d.]+) GB", bar[1])
    assert others is None or float(others[1]) < 2, bar[1]


UNDER_PRESSURE = """
    import pathlib, time
    import gpusim
    import pytest

    @pytest.mark.parametrize("i", range(3))
    def test_takes(i):
        if i == 0:
            pathlib.Path("started").touch()
            while not pathlib.Path("taken").exists():
                time.sleep(0.02)
            time.sleep(0.2)  # longer than a reading of VRAM may be old
        else:
            gpusim.alloc("2.5GB").free()
"""
OTHER_PROCESS = """
    import pathlib, time
    import gpusim

    while not pathlib.Path("started").exists():
        time.sleep(0.02)
    with gpusim.alloc("20GB"):
        pathlib.Path("taken").touch()
        time.sleep(2)
"""


def test_vram_that_others_take(project: Project, machine: Machine) -> None:
    """Where xdist schedules no test waits for it: header and advice say so, and with it they do."""
    project.write(test_project=UNDER_PRESSURE, other=OTHER_PROCESS)
    arguments = ("--gpu-share", "--gpu-share-preset=no-ollama", "-n1", "-v", *REPORTS)

    def run(*more: str) -> Result:
        for name in ("started", "taken"):
            (project.path / name).unlink(missing_ok=True)
        with child_process([sys.executable, "other.py"], cwd=project.path, env=project.environment):
            return project.pytest(*arguments, *more)

    result = run()
    assert "2 failed, 1 passed" in result.out
    note = "only tests with a need of their own wait for it (gpu_share_vram)"
    assert any(note in line for line in result.said)
    report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    (hint,) = report["hints"]
    assert hint.startswith("2 tests ran out of VRAM that other processes took, and did not wait")
    option = re.search(r'-o "(gpu_share_vram=[^"]+)"', hint)
    assert option is not None
    result = run("-o", option[1])
    assert (result.code, result.passed) == (0, 3), result.out
    assert not any(note in line for line in result.said)
