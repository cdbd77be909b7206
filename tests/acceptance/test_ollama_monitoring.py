"""Ollama is monitored: what happens to its models during a run is reported, and proved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from simulator import Device, Machine
from simulator.ollama import OllamaServer

from .conftest import Project, Result
from .test_cli_doctor import doctor

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
        lines = [line for line in lines if not re.match(r"gpu-share: (GPU|gw|hint)", line)]
        golden(Result(result.code, "\n".join(lines) + "\n", ""), f"monitor_{name}")

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


def test_tests_hold_more_than_they_had(
    project: Project, neighbour: OllamaServer, verdict: Callable[[Result, str], None]
) -> None:
    """Nothing caps simulated VRAM: told, and a failure only where strict asks for it."""
    project.write(test_project=HOLD.format(size="6.5GB", after=1.2), conftest=LOAD)
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed) == (0, 2), result.out
    verdict(result, "tests")


def test_another_process(
    project: Project, neighbour: OllamaServer, verdict: Callable[[Result, str], None]
) -> None:
    """What others took after the start is told, and does not fail even a strict run."""
    taking = "from simulator import Machine; Machine.open().set_used(0, '8GB'); time.sleep(1.2)"
    others = LOAD.replace("body =", f"{taking}\n        body =")
    project.write(test_project=HOLD.format(size="4GB", after=1.5), conftest=others)
    result = project.pytest("--gpu-share", "--gpu-share-strict")
    assert (result.code, result.passed) == (0, 2), result.out
    verdict(result, "others")


def test_num_gpu(
    project: Project, neighbour: OllamaServer, verdict: Callable[[Result, str], None]
) -> None:
    """A request that asked for a few layers on the GPU got them."""
    few = LOAD.replace('"stream": false', '"stream": false, "options": {"num_gpu": 10}')
    project.write(test_project=HOLD.format(size="1GB", after=1.2), conftest=few)
    result = project.pytest("--gpu-share", "--gpu-share-strict")
    assert (result.code, result.passed) == (0, 2), result.out
    verdict(result, "num_gpu")


def test_driver_that_does_not_tell(
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: OllamaWith,
    verdict: Callable[[Result, str], None],
) -> None:
    """Under WSL 2, where the founding write-up's tests ran, nobody knows whose VRAM is whose."""
    machine_with(Device(total="24GB", used="2GB")).inject(
        "nvmlDeviceGetComputeRunningProcesses*", code=3
    )
    ollama_with({"qwen2.5:14b": "10.8GB"}, context="500MB")
    project.write(test_project=HOLD.format(size="7GB", after=1.2), conftest=LOAD)
    small = "gpu_share_ollama_vram_reservation_mb=4096"
    result = project.pytest("--gpu-share", "--gpu-share-strict", "-o", small)
    assert (result.code, result.passed) == (1, 2), result.out
    verdict(result, "untold")


def test_absent_model(project: Project, neighbour: OllamaServer) -> None:
    """Nothing was loaded, so there is nothing to say; the plan is the same."""
    result = project.pytest("--gpu-share", "--gpu-share-strict")
    assert (result.code, result.passed, result.workers) == (0, 4, 2)
    assert not [line for line in result.said if line.startswith("gpu-share: Ollama")]


def test_in_process(
    project: Project, neighbour: OllamaServer, verdict: Callable[[Result, str], None]
) -> None:
    """Without workers the process itself is the one that held the VRAM; strict fails the run."""
    project.write(
        test_project="""
            import os, time, urllib.request
            import gpusim

            def test_model():
                with gpusim.alloc("14GB"):
                    time.sleep(0.4)
                    body = b'{"model": "qwen2.5:14b", "stream": false}'
                    url = f"http://{os.environ['OLLAMA_HOST']}/api/generate"
                    urllib.request.urlopen(url, data=body, timeout=60).read()
                    time.sleep(1.2)
        """
    )
    small = "gpu_share_ollama_vram_reservation_mb=4096"
    result = project.pytest("--gpu-share", "-n0", "--gpu-share-strict", "-o", small)
    assert (result.code, result.passed) == (1, 1), result.out
    verdict(result, "in_process")


def test_quiet(project: Project, neighbour: OllamaServer) -> None:
    """-q tells problems alone, and a model that stayed where it was is none."""
    neighbour.load("qwen2.5:14b")
    assert project.pytest("--gpu-share", "-n1", "-q").said == []


def test_report(project: Project, neighbour: OllamaServer) -> None:
    """The report has the verdict, and what Ollama held at the end."""
    neighbour.load("qwen2.5:14b")
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-report=r.json")
    assert result.code == 0, result.out
    ollama = json.loads((project.path / "r.json").read_text(encoding="utf-8"))["ollama"]
    assert ollama["verdict"] == ["Ollama kept qwen2.5:14b on the GPU (10.8 GB, 100 %) throughout"]
    assert ollama["spilled_under_tests"] is False
    size = ollama["models"][0]["size_bytes"]
    assert ollama["models"] == [
        {"name": "qwen2.5:14b", "size_bytes": size, "size_vram_bytes": size, "spilled": False}
    ]


def test_not_monitored(project: Project, neighbour: OllamaServer) -> None:
    """Nobody is asked more than at the start where there is nothing to monitor."""
    for options in (
        ["-o", "gpu_share_ollama_gpu=none"],
        ["--gpu-share-simulate=24GB:used=2GB"],
        ["-o", "gpu_share_enable_ollama_detection=false"],
    ):
        neighbour.requests.clear()
        result = project.pytest("--gpu-share", "-n1", *options)
        assert result.code == 0, result.out
        asked = [request.path for request in neighbour.requests]
        assert asked in ([], ["/api/version", "/api/ps"]), options


# --- what a verdict claims ---

STOP = """
    import os, pathlib, signal, time

    def test_it():
        time.sleep({before})
        pid = int(pathlib.Path("server.pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep({after})
"""


@pytest.fixture
def process_with(project: Project) -> Iterator[Callable[..., int]]:
    """Start an Ollama as a process of its own, which can be stopped; returns its PID."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> int:
        command = [sys.executable, "-m", "simulator.ollama", *arguments]
        process = subprocess.Popen(
            command, env=project.environment, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        project.environment["OLLAMA_HOST"] = process.stdout.readline().strip()
        (project.path / "server.pid").write_text(str(process.pid))
        return process.pid

    yield start
    for process in started:
        process.kill()  # stopped or not; its runners end with it
        process.communicate(timeout=30)


def test_server_that_stopped_answering(
    project: Project, machine: Machine, process_with: Callable[..., int]
) -> None:
    """The verdict ends with the last answer: nobody knows what came after it."""
    process_with("--models", '{"qwen2.5:14b": "10.8GB"}', "--load", "qwen2.5:14b")
    project.write(test_project=STOP.format(before=3, after=4))
    began = time.monotonic()
    result = project.pytest("--gpu-share", "-n1")
    took = time.monotonic() - began
    assert (result.code, result.passed) == (0, 1), result.out + result.err
    said = [line for line in result.said if line.startswith("gpu-share: Ollama")]
    assert len(said) == 2
    last = re.fullmatch(
        r"gpu-share: Ollama kept qwen2\.5:14b on the GPU \(10\.8 GB, 100 %\) until Ollama answered "
        r"last, (\d+) s into the run",
        said[0],
    )
    first = re.fullmatch(
        r"gpu-share: Ollama did not answer from (\d+) s into the run to its end: what happened to "
        r"its VRAM then is unknown",
        said[1],
    )
    assert last, said
    assert first, said
    # It stopped at least 3 s after the start, and 4 s before the end.
    assert all(2 <= int(at[1]) <= took - 3 for at in (last, first)), (said, took)


def test_server_that_never_answered_again(
    project: Project, machine: Machine, process_with: Callable[..., int]
) -> None:
    """After the question at the start: kept is what was seen then, and no more."""
    process_with("--models", '{"qwen2.5:14b": "10.8GB"}', "--load", "qwen2.5:14b")
    project.write(
        test_project="""
            import time

            def test_it():
                time.sleep(2.5)
        """,
        # Before the monitor starts: on a busy machine it asks again before the first test.
        conftest="""
            import os, pathlib, signal
            import pytest

            @pytest.hookimpl(tryfirst=True)
            def pytest_sessionstart(session):
                if not hasattr(session.config, "workerinput"):
                    os.kill(int(pathlib.Path("server.pid").read_text()), signal.SIGSTOP)
        """,
    )
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 1), result.out + result.err
    assert "until Ollama answered last, 0 s into the run" in result.out
    assert "throughout" not in result.out


def test_loads_of_two_models_in_turn(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """A server that keeps one model: neither was there throughout, and more loads may have been."""
    machine_with(Device(total="24GB", used="2GB"))
    server = ollama_with({"tiny-a": "1GB", "tiny-b": "1GB"}, load="tiny-b", max_loaded=1)
    project.write(
        test_project="""
            import os, time, urllib.request

            def test_it():
                for number in range(6):
                    body = b'{"model": "tiny-%s", "stream": false}' % b"ab"[number % 2 :][:1]
                    url = f"http://{os.environ['OLLAMA_HOST']}/api/generate"
                    urllib.request.urlopen(url, data=body, timeout=60).read()
                    # No multiple of the pause between two requests of the monitor.
                    time.sleep(1.6)
        """
    )
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 1), result.out + result.err
    said = [line for line in result.said if line.startswith("gpu-share: Ollama kept")]
    assert len(said) == 2, said
    assert not [line for line in said if "throughout" in line]
    assert all("at least" in line or "until it was unloaded" in line for line in said)
    assert server.ps()[0]["name"] == "tiny-b:latest"


def test_server_without_a_gpu(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """Every model in RAM while VRAM is free: that is what is said, not how to make room."""
    machine_with(Device(total="24GB", used="2GB"))
    ollama_with({"m": "1GB"}, load="m", visible="")
    result = project.pytest("--gpu-share", "-n1")
    assert result.said[3].endswith(": m:latest 1.0 GB, on the CPU, not on GPU")
    (said,) = [line for line in result.said if line.startswith("gpu-share: Ollama had")]
    assert said.startswith(
        "gpu-share: Ollama had m:latest (1.0 GB) in RAM before the tests began, though 22.0 GB of "
        "VRAM were free: the server uses no GPU, or num_gpu"
    )
    assert "free VRAM" not in result.out


def test_model_that_was_loaded_while_vram_was_taken(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """Its buffers are on the GPU, so the server has one: to reload it is what helps."""
    machine = machine_with(Device(total="24GB", used="23GB"))
    ollama_with({"m": "1GB"}, load="m", cpu_bytes="40MB")
    machine.set_used(0, "2GB")
    result = project.pytest("--gpu-share", "-n1")
    assert result.said[3].endswith(": m:latest 1.0 GB, 3 % on GPU, perhaps no layer")
    (said,) = [line for line in result.said if line.startswith("gpu-share: Ollama had")]
    assert said.startswith(
        "gpu-share: Ollama had m:latest (1.0 GB) in RAM before the tests began, though 22.0 GB of "
        "VRAM were free: it was loaded while VRAM was taken, and a loaded model is never moved: "
        "reload it (ollama stop m:latest); if it stays in RAM, the server uses no GPU, or num_gpu"
    )
    report = doctor(project)
    assert report.fix("ollama-without-gpu").startswith("it was loaded while VRAM was taken")


def test_a_spilled_model_that_was_unloaded(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """Nobody can reload what is not there: no advice to do so."""
    machine = machine_with(Device(total="24GB", used="18GB"))
    server = ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b", keep_alive="1s")
    assert server.spilled() == ["qwen2.5:14b"]
    server.load("qwen2.5:14b", keep_alive="4s")
    machine.set_used(0, "18GB")
    project.write(test_project="import time\ndef test_it(): time.sleep(6)")
    result = project.pytest("--gpu-share", "-n1")
    (said,) = [line for line in result.said if line.startswith("gpu-share: Ollama had")]
    assert re.search(r"and unloaded it \d s into the run$", said)
    assert "reload it" not in result.out
