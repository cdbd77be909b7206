"""Ollama under guard: what happens to its models during a run is told, and proved."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from simulator import Device, Machine
from simulator.ollama import OllamaServer

from .conftest import Project, Result

OllamaWith = Callable[..., OllamaServer]

# Tests that hold VRAM until somebody else, the user's other program, has had Ollama load a model.
HOLD = """
    import pathlib, time
    import gpusim
    import pytest

    @pytest.mark.parametrize("i", range(2))
    def test_model(i):
        with gpusim.alloc("{size}"):
            pathlib.Path(f"holding-{{i}}").touch()
            until = time.monotonic() + 30
            while not pathlib.Path("loaded").exists() and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep({after})
"""
LOAD = """
    import os, pathlib, threading, time, urllib.request

    def load():
        until = time.monotonic() + 30
        while len(list(pathlib.Path(".").glob("holding-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        body = b'{"model": "qwen2.5:14b", "keep_alive": "5m", "stream": false}'
        url = f"http://{os.environ['OLLAMA_HOST']}/api/generate"
        urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=60).read()
        pathlib.Path("loaded").touch()

    def pytest_sessionstart(session):
        if not hasattr(session.config, "workerinput"):
            thread = threading.Thread(target=load)
            thread.start()
            session.config.add_cleanup(thread.join)
"""


@pytest.fixture
def neighbour(machine_with: Callable[..., Machine], ollama_with: OllamaWith) -> OllamaServer:
    """24 GB, 22 GB free, and an Ollama that will be asked for its model in mid-run."""
    machine_with(Device(total="24GB", used="2GB"))
    return ollama_with({"qwen2.5:14b": "10.8GB"})


@pytest.fixture
def verdict(golden: Callable[[Result, str], None]) -> Callable[[Result, str], None]:
    """Compare the plugin's lines after the tests with golden text."""

    def compare(result: Result, name: str) -> None:
        after = result.out.partition("[100%]")[2]
        lines = Result(result.code, after, "").said
        # What the tests used is told, too, with a drawing that is never the same.
        lines = [line for line in lines if not re.match(r"gpu-share: (GPU|gw)", line)]
        golden(Result(result.code, "\n".join(lines) + "\n", ""), f"guard_{name}")

    return compare


def test_reservation_too_small(
    project: Project, neighbour: OllamaServer, verdict: Callable[[Result, str], None]
) -> None:
    """The verdict names the reservation that suffices, and a run with it passes under strict."""
    project.write(test_project=HOLD.format(size="7GB", after=1.2), conftest=LOAD)
    key = "gpu_share_ollama_vram_reservation_mb"
    result = project.pytest("--gpu-share", "--gpu-share-strict", "-o", f"{key}=4096")
    assert (result.code, result.passed, result.err) == (1, 2, "")
    verdict(result, "reservation")
    named = re.search(rf"{key} = (\d+) would", result.out)
    assert named is not None
    neighbour.unload("qwen2.5:14b")
    for path in [project.path / "loaded", *project.path.glob("holding-*")]:
        path.unlink()
    # The smaller slots of the larger reservation hold smaller tests.
    project.write(test_project=HOLD.format(size="3.5GB", after=0))
    result = project.pytest("--gpu-share", "--gpu-share-strict", "-o", f"{key}={named[1]}")
    assert (result.code, result.passed, result.workers) == (0, 2, 2), result.out
    verdict(result, "reservation_enough")
