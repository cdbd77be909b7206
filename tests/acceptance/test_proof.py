"""The founding problem, before and after: three workers of 8 GB beside an Ollama of 10.8 GB."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from simulator import Device, Machine
from simulator.ollama import OllamaServer

from .conftest import Project

SUITE = """
    import pathlib, time
    import gpusim
    import pytest

    @pytest.mark.parametrize("i", range(6))
    def test_model(i):
        with gpusim.alloc("{size}"):
            pathlib.Path("running").touch()
            time.sleep(0.4)
"""
OLLAMA_IN_THE_MIDDLE = """
    import os, pathlib, threading, time, urllib.request

    def load():
        until = time.monotonic() + 30
        while not pathlib.Path("running").exists() and time.monotonic() < until:
            time.sleep(0.02)
        body = b'{"model": "qwen2.5:14b", "keep_alive": "5m", "stream": false}'
        url = f"http://{os.environ['OLLAMA_HOST']}/api/generate"
        urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=60).read()

    def pytest_sessionstart(session):
        # Somebody talks to Ollama while the tests run; here it is the controller's process.
        if not hasattr(session.config, "workerinput"):
            thread = threading.Thread(target=load)
            thread.start()
            session.config.add_cleanup(thread.join)
"""

FOLLOWING_THE_MODEL = [
    "-o", "gpu_share_ollama_vram_reservation_mb=auto",
    "-o", "gpu_share_ollama_models=qwen2.5:14b",
    "-o", "gpu_share_ollama_context=4096",
    "-o", "gpu_share_ollama_timeout_s=5",
]  # fmt: skip


@pytest.fixture
def neighbour(
    machine_with: Callable[..., Machine], ollama_with: Callable[..., OllamaServer]
) -> tuple[Machine, OllamaServer]:
    """24 GB, 22 GB free, and an Ollama that will be asked for its model in mid-run."""
    machine = machine_with(Device(total="24GB", used="2GB"), context="0MB")
    return machine, ollama_with({"qwen2.5:14b": "10.8GB"})


def on_gpu(server: OllamaServer) -> float:
    """The part of the loaded model that lies on the GPU, from 0 to 1."""
    (model,) = server.request("/api/ps")["models"]
    return float(model["size_vram"]) / float(model["size"])


def test_before(project: Project, neighbour: tuple[Machine, OllamaServer]) -> None:
    """Stock xdist: tests run out of memory, or Ollama falls to the CPU."""
    machine, server = neighbour
    project.write(test_project=SUITE.format(size="8GB"), conftest=OLLAMA_IN_THE_MIDDLE)
    result = project.pytest("-n", "3")
    assert result.workers == 3
    out_of_memory = "OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB" in result.out
    assert out_of_memory or on_gpu(server) < 1
    assert (result.code == 1) == out_of_memory
    assert machine.snapshot()[0].peak_used <= 24 * 2**30


@pytest.mark.parametrize(
    ("size", "options", "workers", "headline"),
    [
        ("4GB", [], 2, "2 GPU workers × 4.5 GB = 9.0 GB"),
        ("8GB", ["-o", "gpu_share_min_vram_per_worker_gb=8"], 1, "1 GPU worker × 9.0 GB = 9.0 GB"),
        ("4.15GB", FOLLOWING_THE_MODEL, 2, "2 GPU workers × 4.29 GB = 8.58 GB"),
    ],
)
def test_after(
    size: str,
    options: list[str],
    workers: int,
    headline: str,
    project: Project,
    neighbour: tuple[Machine, OllamaServer],
) -> None:
    """The same suite under --gpu-share: all tests pass and Ollama loads on the GPU, whole."""
    machine, server = neighbour
    project.write(test_project=SUITE.format(size=size), conftest=OLLAMA_IN_THE_MIDDLE)
    result = project.pytest("--gpu-share", *options)
    assert headline in result.said[0]
    assert (result.code, result.passed, result.workers) == (0, 6, workers), result.out
    assert on_gpu(server) == 1
    kept = r"gpu-share: Ollama kept qwen2\.5:14b on the GPU \(10\.8 GB, 100 %\) throughout; loaded"
    assert re.search(kept, result.out), result.out
    assert machine.snapshot()[0].oom_count == 0


def test_after_with_contexts(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., OllamaServer]
) -> None:
    """With a context of 500 MB for each process a test of 4 GB still fits its slot of 4.5 GB."""
    machine = machine_with(Device(total="24GB", used="2GB"), context="500MB")
    server = ollama_with({"qwen2.5:14b": "10.8GB"})
    project.write(test_project=SUITE.format(size="4GB"), conftest=OLLAMA_IN_THE_MIDDLE)
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed, on_gpu(server)) == (0, 6, 1), result.out
    assert machine.snapshot()[0].peak_used <= 24 * 2**30
