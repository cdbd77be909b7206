"""A second server beside Ollama: what it takes is a module, `toyserve/neighbour.py`, and a line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from simulator import Machine
from simulator.child import child_process

import pytest_gpushare
from pytest_gpushare.report.reading import read_report

from .conftest import Project, closed_port

GB = 1024**3
TOYSERVE = Path(__file__).parents[1] / "toyserve"
LINE = '"pytest_gpushare.neighbours.toyserve:ToyServe"'
FOUR_TESTS = """
    import time
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(4))
    def test_it(i):
        time.sleep(0.5)
"""
SETTINGS = (
    *("-o", "gpu_share_ollama_vram_reservation_mb=6144"),
    *("-o", "gpu_share_max_workers_per_gpu=0"),
    *("-o", "gpu_share_max_workers_per_gb=0.3"),
)
HEADER = [
    "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB (limited by max_workers_per_gb; preset "
    "conservative)",
    "  GPU 0 NVIDIA GeForce RTX 3090 Ti: total 24.0 GB, available 18.0 GB",
    "  VRAM: Ollama reservation 6.0 GB, ToyServe reservation 6.0 GB (4.0 GB of it resident), "
    "safety buffer 1.0 GB, usable for tests 9.0 GB",
]


def with_toyserve(directory: Path) -> Path:
    """The package with one more module and one more line, below a directory for `PYTHONPATH`."""
    package = directory / "pytest_gpushare"
    shutil.copytree(Path(pytest_gpushare.__file__).parent, package)
    shutil.copy(TOYSERVE / "neighbour.py", package / "neighbours" / "toyserve.py")
    registry = package / "neighbours" / "__init__.py"
    before = registry.read_text()
    first = 'SERVERS = ("pytest_gpushare.neighbours.ollama:Ollama",'
    assert before.count(first) == 1
    registry.write_text(before.replace(first, f"{first} {LINE}"))
    return directory


@contextmanager
def serving(
    project: Project, held: str = "3GB", most: str = "6GB", command: tuple[str, ...] = ()
) -> Iterator[str]:
    """ToyServe beside the project, on its machine; the address."""
    port = closed_port()
    with child_process(
        [*(command or (sys.executable,)), TOYSERVE / "server.py", str(port), held, most],
        env={**os.environ, **project.environment},
        stdin=subprocess.DEVNULL,
    ) as process:
        host = f"127.0.0.1:{port}"
        await_answer(host)
        yield host
        process.kill()


def await_answer(host: str) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}/status", timeout=5):
                return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.fixture
def toyserve(project: Project, machine: Machine, tmp_path: Path) -> Iterator[str]:
    """ToyServe holds 3 GB, and 1 GB for its context, of 22 GB; it is to have 6 GB."""
    package = with_toyserve(tmp_path / "package")
    path = (str(package), project.environment["PYTHONPATH"])
    project.environment["PYTHONPATH"] = os.pathsep.join(path)
    # Of the closed port that it names ToyServe might be given the number.
    project.environment["OLLAMA_HOST"] = "127.0.0.1:9"
    with serving(project) as host:
        project.environment["TOYSERVE"] = host
        yield host


def test_it_has_its_share_of_the_plan(project: Project, toyserve: str, tmp_path: Path) -> None:
    """Two workers fit beside it, and three without; header, report and samples name it."""
    project.write(test_project=FOUR_TESTS)
    report = tmp_path / "r.json"
    done = project.pytest("--gpu-share", *SETTINGS, f"--gpu-share-report={report}")
    assert (done.code, done.passed, done.workers) == (0, 4, 2), done.out + done.err
    assert done.said[:3] == HEADER
    assert f"  ToyServe 1.2 at {toyserve}: 3.0 GB in VRAM" in done.said
    document = read_report(report)
    (device,) = document["devices"]
    assert device["servers"] == {
        "ToyServe": {"reservation_bytes": 6 * GB, "resident_bytes": 4 * GB}
    }
    (server,) = document["servers"]
    assert (server["name"], server["version"], server["vram_bytes"]) == ("ToyServe", "1.2", 3 * GB)
    (samples,) = document["samples"]["devices"].values()
    # Where no list of processes was read its own word counts, which leaves out its context.
    assert {*samples["servers_bytes"]["ToyServe"]} - {3 * GB} == {4 * GB}
    # What it holds is neither the tests' nor other processes'.
    assert {*filter(None, samples["others_bytes"])} == {2 * GB}
    without = project.pytest("--gpu-share", *SETTINGS, TOYSERVE=None)
    assert (without.code, without.workers) == (0, 3), without.out
    assert not any("ToyServe" in line for line in without.said)


def test_what_it_takes_makes_a_test_wait(project: Project, toyserve: str, tmp_path: Path) -> None:
    """While it holds more than was kept for it, a test that lacks the VRAM waits, and says why.

    It holds that until the reason was given.
    """
    project.write(
        test_project=f"""
            import urllib.request
            import pytest

            @pytest.mark.gpu(vram="1GB")
            def test_first():
                more = urllib.request.Request(
                    "http://{toyserve}/hold?size=12GB&until={project.path}/noted", method="POST")
                urllib.request.urlopen(more, timeout=10).read()

            @pytest.mark.gpu(vram="8GB")
            def test_second():
                pass
        """,
        conftest="""
            import pathlib
            from pytest_gpushare.events import Record

            note = Record.note

            def noted(self, kind, *arguments, **facts):
                event = note(self, kind, *arguments, **facts)
                if kind == "pressure":
                    pathlib.Path(__file__).with_name("noted").touch()
                return event

            Record.note = noted
        """,
    )
    report = tmp_path / "r.json"
    done = project.pytest("--gpu-share", "-n1", *SETTINGS, f"--gpu-share-report={report}")
    assert (done.code, done.passed) == (0, 2), done.out + done.err
    document = read_report(report)
    first = next(event for event in document["events"] if event["kind"] == "pressure")
    # By its own word, or as listed: with its context.
    assert re.search(r"held by ToyServe 1[23]\.0 GB", first["text"]), first
    waited = next(t for t in document["tests"] if t["nodeid"].endswith("test_second"))["waited_s"]
    assert waited > 0.5


def test_advice_leaves_it_its_vram(project: Project, toyserve: str) -> None:
    """What is advised for Ollama's reservation takes nothing from ToyServe's; what is typed
    gives what is promised."""
    project.write(
        test_project="""
            import pytest

            @pytest.mark.gpu
            def test_it():
                assert False
        """
    )
    arguments = ("--gpu-share", "-o", "gpu_share_min_vram_per_worker_gb=12")
    done = project.pytest(*arguments, "-o", "gpu_share_ollama_vram_reservation_mb=14336")
    advised = ("-o", "gpu_share_ollama_vram_reservation_mb=3072")
    hint = f"{' '.join(advised)} would allow 1 GPU worker of 12.0 GB"
    assert any(line.endswith(hint) for line in done.said), done.out
    # Of the 18 GB that are free ToyServe is to have 2 more.
    most = "-o gpu_share_ollama_gpu=none -o gpu_share_min_vram_per_worker_gb=15 would allow 1 GPU"
    without = project.pytest("--gpu-share", "-o", "gpu_share_min_vram_per_worker_gb=17")
    assert f"if no Ollama is to run here, {most}" in without.out
    done = project.pytest(*arguments, *advised)
    assert done.said[0].startswith("gpu-share: 1 GPU worker × 12.0 GB"), done.out


def test_without_a_list_of_processes(
    project: Project, machine: Machine, toyserve: str, tmp_path: Path
) -> None:
    """In a container NVML names nobody: then its own word counts, which is asked for again."""
    for function in ("nvmlDeviceGetComputeRunningProcesses*", "nvmlDeviceGetGraphicsRunning*"):
        machine.inject(function, code=3)
    project.write(
        test_project=f"""
            import time
            import urllib.request
            import pytest

            @pytest.mark.gpu
            def test_it():
                more = urllib.request.Request("http://{toyserve}/hold?size=5GB", method="POST")
                urllib.request.urlopen(more, timeout=10).read()
                time.sleep(4)
        """
    )
    report = tmp_path / "r.json"
    done = project.pytest("--gpu-share", *SETTINGS, f"--gpu-share-report={report}")
    assert (done.code, done.workers) == (0, 2), done.out + done.err
    assert "ToyServe reservation 6.0 GB (3.0 GB of it resident)" in done.said[2]
    (samples,) = read_report(report)["samples"]["devices"].values()
    held = [size for size in samples["servers_bytes"]["ToyServe"] if size is not None]
    assert (held[0], held[-1]) == (3 * GB, 5 * GB)


def test_it_does_not_answer(project: Project, machine: Machine, toyserve: str) -> None:
    """The header says so; what NVML lists of it is still its own."""
    away = f"127.0.0.1:{closed_port()}"
    done = project.pytest("--gpu-share", *SETTINGS, TOYSERVE=away)
    assert (done.code, done.workers) == (0, 3), done.out
    (line,) = [line for line in done.said if "ToyServe" in line]
    assert line == f"  ToyServe at {away}: nothing listens there; no VRAM is reserved for it"


def test_commands(project: Project, toyserve: str) -> None:
    """`plan`, `watch` and `doctor` name it."""
    line = f"ToyServe 1.2 at {toyserve}: 3.0 GB in VRAM"
    document = json.loads(command(project, "plan", "--json", "--", *SETTINGS))
    assert document["servers"][0]["name"] == "ToyServe"
    assert f"  {line}" in document["lines"]
    seen: dict[str, Any] = json.loads(command(project, "watch", "--once", "--json"))
    assert seen["servers"][0]["vram_bytes"] == 3 * GB
    assert seen["devices"][0]["servers_bytes"] == {"ToyServe": 4 * GB}
    shown = command(project, "watch", "--once")
    assert "Ollama 0.0 GB + ToyServe 4.0 GB, tests 0.0 GB, others 2.0 GB" in shown
    assert line in shown
    assert line in command(project, "doctor")


def command(project: Project, name: str, *arguments: str) -> str:
    """What a command of the plugin writes."""
    return project.command([sys.executable, "-m", "pytest_gpushare", name, *arguments]).out
