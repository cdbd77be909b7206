"""Models loaded before the workers are counted, kept until the end, and given back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.child import child_process, wait_for
from simulator.ollama import FaultyServer, Model, OllamaServer

from pytest_gpushare.leases.ledger import Ledger
from pytest_gpushare.leases.records import LeaseRecord

from .conftest import TRIVIAL, Project

ON = ("--gpu-share", "-o", "gpu_share_ollama_preload=true")
MODELS = "gpu_share_ollama_models="
QWEN = "qwen2.5:14b"


@pytest.fixture
def server(machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]) -> OllamaServer:
    """24 GB, 22 GB free, and an Ollama that holds nothing yet."""
    machine_with(Device(total="24GB", used="2GB"))
    return ollama_with(
        [
            Model(QWEN, "10.8GB"),
            Model("small:1b", "1GB"),
            Model("other:1b", "1GB"),
            Model("embed:1b", "1GB", embeds=True),
            Model("huge:70b", "40GB"),
        ]
    )


def keeps(server: OllamaServer, name: str) -> float:
    """For how many more seconds Ollama keeps a model."""
    entry = next(entry for entry in server.ps() if entry["name"] == name)
    text = re.sub(r"\.(\d{1,6})\d*", r".\1", entry["expires_at"]).replace("Z", "+00:00")
    return (datetime.fromisoformat(text) - datetime.now(timezone.utc)).total_seconds()


def changes(server: OllamaServer) -> list[tuple[str, Any]]:
    """(path, body) of the requests that may change something."""
    return [
        (request.path, request.json())
        for request in server.requests
        if request.path in ("/api/generate", "/api/embed")
    ]


def test_preload(project: Project, server: OllamaServer) -> None:
    """Loaded one after another, counted as resident, kept for the tests, then as usual."""
    result = project.pytest(
        *ON, "-n1", "-o", f"{MODELS}{QWEN} embed:1b", "--gpu-share-report=r.json"
    )
    assert (result.code, result.passed, result.err) == (0, 4, ""), result.out
    assert "  VRAM: Ollama reservation 12.0 GB (11.8 GB of it resident)" in result.out
    assert f"gpu-share: Ollama kept {QWEN} on the GPU (10.8 GB, 100 %) throughout" in result.out
    assert "gpu-share: Ollama kept embed:1b on the GPU (1.0 GB, 100 %) throughout" in result.out
    events = json.loads((project.path / "r.json").read_text(encoding="utf-8"))["events"]
    told = [event["text"] for event in events if event["kind"] == "ollama-preloaded"]
    assert [re.sub(r"\d+ s", "N s", text) for text in told] == [
        f"Ollama loaded {QWEN} 10.8 GB, 100 % on GPU before the tests (N s)",
        "Ollama loaded embed:1b 1.0 GB, 100 % on GPU before the tests (N s)",
    ]
    # The server's own keep-alive: nothing has to be given back, and nothing stays after a kill.
    assert changes(server) == [
        ("/api/generate", {"model": QWEN, "stream": False}),
        ("/api/generate", {"model": "embed:1b", "stream": False}),
        ("/api/embed", {"model": "embed:1b", "input": ""}),
    ]
    assert 0 < keeps(server, QWEN) <= 300
    assert 0 < keeps(server, "embed:1b") <= 300


def test_what_is_loaded_is_left_alone(project: Project, server: OllamaServer) -> None:
    """Not one request that could change a model that somebody else has loaded."""
    server.load(QWEN, keep_alive="20m", num_ctx=8192)
    before, server.requests = server.ps(), []
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}{QWEN}")
    assert (result.code, result.passed) == (0, 4), result.out
    assert changes(server) == []
    assert server.ps() == before


def test_without_preload_nothing_is_changed(project: Project, server: OllamaServer) -> None:
    """All requests of a run that does not ask for it are questions."""
    result = project.pytest("--gpu-share", "-n1", "-o", f"{MODELS}{QWEN}")
    assert result.code == 0
    assert {r.path for r in server.requests} <= {
        "/api/version",
        "/api/ps",
        "/api/tags",
        "/api/show",
    }
    assert server.ps() == []


def test_keep_alive_of_the_server(project: Project, server: OllamaServer) -> None:
    """Also where a test fails, and where no worker starts at all."""
    server.scheduler.settings = type(server.scheduler.settings)(keep_alive="90s")
    project.write(test_project="def test_it(): assert 0")
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}small:1b")
    assert result.code == 1
    assert 0 < keeps(server, "small:1b") <= 90
    server.unload("small:1b")
    no_room = ["-o", "gpu_share_min_vram_per_worker_gb=20"]
    no_room += ["-o", "gpu_share_fallback_to_cpu_when_constrained=false"]
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}small:1b", *no_room)
    assert result.code == 4
    assert 0 < keeps(server, "small:1b") <= 90


@pytest.mark.parametrize(
    ("own", "number", "least", "most"),
    [
        ("90s", signal.SIGTERM, 0, 90),
        ("90s", signal.SIGKILL, 0, 90),
        # Kept by a keep-alive of ours, which cannot be taken back after SIGKILL.
        ("10s", signal.SIGTERM, 0, 10),
        ("10s", signal.SIGKILL, 500, 600),
    ],
)
@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_killed(
    project: Project,
    server: OllamaServer,
    workers: str,
    own: str,
    number: int,
    least: float,
    most: float,
) -> None:
    """A run that is killed leaves no model pinned: it goes when the server itself lets it go."""
    server.scheduler.settings = type(server.scheduler.settings)(keep_alive=own)
    project.write(
        test_project="""
            import pathlib, time

            def test_it():
                pathlib.Path("began").touch()
                time.sleep(60)
        """
    )
    command = inner_command(*ON, workers, "-o", f"{MODELS}small:1b")
    process = subprocess.Popen(
        command, cwd=project.path, env=project.environment, stdout=subprocess.DEVNULL
    )
    try:
        wait_for((project.path / "began").exists)
        assert (keeps(server, "small:1b") > 500) == (own == "10s")
        process.send_signal(number)
        assert process.wait(30) == -number
    finally:
        process.kill()
        process.wait(30)
    assert least < keeps(server, "small:1b") <= most


def test_terminated_while_another_model_loads(project: Project, server: OllamaServer) -> None:
    """SIGTERM ends that load, and gives back what was loaded before it."""
    settings = type(server.scheduler.settings)
    server.scheduler.settings = settings(keep_alive="10s", load_delay=3.0)
    command = inner_command(*ON, "-o", f"{MODELS}small:1b other:1b")
    with child_process(
        command, cwd=project.path, env=project.environment, stdout=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: any(body["model"] == "other:1b" for _, body in changes(server)))
        assert keeps(server, "small:1b") > 500
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    assert keeps(server, "small:1b") <= 10
    time.sleep(3.0)
    assert "other:1b" not in [entry["name"] for entry in server.ps()]


def test_terminated_between_preload_and_tests(project: Project, server: OllamaServer) -> None:
    """SIGTERM before the first worker is up gives the model back, too."""
    server.scheduler.settings = type(server.scheduler.settings)(keep_alive="10s")
    project.write(
        conftest="""
            import pathlib, time

            def pytest_gpushare_plan(config, plan):
                pathlib.Path("began").touch()
                time.sleep(60)
        """
    )
    command = inner_command(*ON, "-o", f"{MODELS}small:1b")
    with child_process(
        command, cwd=project.path, env=project.environment, stdout=subprocess.DEVNULL
    ) as process:
        wait_for((project.path / "began").exists)
        assert keeps(server, "small:1b") > 500
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    assert keeps(server, "small:1b") <= 10


def test_what_does_not_fit(project: Project, server: OllamaServer) -> None:
    """What is known not to fit is not loaded; `fail` ends the run before the first test."""
    server.load("other:1b")
    server.requests.clear()
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}huge:70b missing:7b")
    assert (result.code, result.passed) == (0, 4), result.out
    problems = [line for line in result.said if "was not preloaded" in line]
    assert problems == [
        "  huge:70b was not preloaded: it does not fit wholly on the GPU: it needs 47.05 GB of "
        "free VRAM, and the device has 24.0 GB; it was not loaded",
        "  missing:7b was not preloaded: the server does not have it: ollama pull missing:7b",
    ]
    assert (changes(server), len(server.ps())) == ([], 1)
    server.unload("other:1b")
    auto = ["-o", "gpu_share_ollama_vram_reservation_mb=auto"]
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}missing:7b", *auto)
    assert (result.code, result.out.count("ollama pull missing:7b")) == (0, 1), result.out
    fail = ["-o", "gpu_share_ollama_preload_failed=fail"]
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}small:1b missing:7b", *fail)
    assert result.code == 4
    assert result.err.splitlines() == [
        "ERROR: gpu-share: not preloaded: missing:7b: the server does not have it: ollama pull "
        "missing:7b; gpu_share_ollama_preload_failed is fail: free "
        "VRAM, name other models, or set it to warn",
        "",
    ]
    assert 0 < keeps(server, "small:1b") <= 300


def test_half_on_the_cpu_is_unloaded_again(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]
) -> None:
    """What looked as if it fitted, and did not: not left on the CPU, where it holds VRAM."""
    machine_with(Device(total="8GB", used="3GB"))
    server = ollama_with({"big:7b": Model("big:7b", "4.6GB", info={"qwen2.block_count": 0})})
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}big:7b")
    assert (result.code, result.passed) == (0, 4), result.out
    (problem,) = [line for line in result.said if "was not preloaded" in line]
    assert re.fullmatch(
        r"  big:7b was not preloaded: it does not fit wholly on the GPU: big:7b 4\.6 GB, \d+ % on "
        r"GPU; 5\.0 GB of VRAM were free; it was unloaded again",
        problem,
    )
    assert server.ps() == []
    fail = ["-o", "gpu_share_ollama_preload_failed=fail"]
    assert project.pytest(*ON, "-n1", "-o", f"{MODELS}big:7b", *fail).code == 4
    assert server.ps() == []


def test_model_that_another_session_uses_is_not_unloaded(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]
) -> None:
    """Though it is half on the CPU: the other session began to use it meanwhile."""
    machine_with(Device(total="8GB", used="3GB"))
    server = ollama_with({"big:7b": Model("big:7b", "4.6GB", info={"qwen2.block_count": 0})})
    ledger = Ledger(Path(project.environment["PYTEST_GPUSHARE_LEASES"]))
    with ledger.gate():
        ledger.publish(LeaseRecord(os.getpid(), models=("big:7b",)))
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}big:7b")
    assert (result.code, result.passed) == (0, 4), result.out
    (problem,) = [line for line in result.said if "was not preloaded" in line]
    assert problem.endswith("; another session uses it, so it was not unloaded")
    assert len(server.ps()) == 1
    ledger.close()


@pytest.mark.parametrize("most", [1, 3])
def test_what_somebody_else_loaded_is_not_evicted(
    project: Project, server: OllamaServer, most: int
) -> None:
    """Nobody can see how many models a server keeps: without a word on it nothing is loaded."""
    server.scheduler.settings = type(server.scheduler.settings)(max_loaded=most)
    server.load("small:1b", keep_alive="20m")
    pids, server.requests = server.runner_pids(), []
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}embed:1b")
    assert (result.code, changes(server)) == (0, [])
    assert (
        "  embed:1b was not preloaded: small:1b is loaded, and loading another model might evict "
        "it: unload it (ollama stop small:1b), name it in gpu_share_ollama_models too, or set "
        "OLLAMA_MAX_LOADED_MODELS for the tests as it is set for the server"
    ) in result.said
    told = project.pytest(*ON, "-n1", "-o", f"{MODELS}embed:1b", OLLAMA_MAX_LOADED_MODELS=str(most))
    assert told.code == 0
    assert pids[0] in server.runner_pids()
    assert len(server.ps()) == min(2, most)
    assert 1000 < keeps(server, "small:1b") <= 1200


def test_models_that_evict_each_other(project: Project, server: OllamaServer) -> None:
    """A server that keeps one model: what the next load evicted is said, and fails the run."""
    server.scheduler.settings = type(server.scheduler.settings)(max_loaded=1)
    names = f"{MODELS}small:1b other:1b"
    text = "it was evicted when other:1b was loaded: the server does not keep both"
    result = project.pytest(*ON, "-n1", "-o", names)
    assert (result.code, result.passed) == (0, 4)
    assert f"  small:1b was not preloaded: {text}" in result.said
    server.unload("other:1b")
    fail = ["-o", "gpu_share_ollama_preload_failed=fail"]
    result = project.pytest(*ON, "-n1", "-o", names, *fail)
    assert (result.code, f"not preloaded: small:1b: {text}" in result.err) == (4, True)


@pytest.mark.parametrize("kind", ["copy_of", "made_from"])
def test_alias_of_a_loaded_model(
    kind: str,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
) -> None:
    """Two names of one file are one process: nothing is sent, and nothing of the other changes."""
    machine_with(Device(total="24GB", used="2GB"))
    alias = Model("alias", "5GB", **{kind: "real:7b"})
    server = ollama_with({"real:7b": Model("real:7b", "5GB"), "alias": alias})
    server.load("real:7b", keep_alive="7m")
    pids, server.requests = server.runner_pids(), []
    fail = ["-o", "gpu_share_ollama_preload_failed=fail"]
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}alias", *fail, "--gpu-share-report=r.json")
    assert (result.code, result.passed) == (0, 4), result.out + result.err
    assert (changes(server), server.runner_pids()) == ([], pids)
    assert 360 < keeps(server, "real:7b") <= 420
    events = json.loads((project.path / "r.json").read_text(encoding="utf-8"))["events"]
    assert "alias has the file of real:7b, which Ollama has loaded" in [e["text"] for e in events]


def test_server_without_a_gpu(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]
) -> None:
    """Every model in RAM while VRAM is free is no matter of room."""
    machine_with(Device(total="24GB", used="2GB"))
    server = ollama_with({"small:1b": "1GB"}, visible="")
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}small:1b")
    assert result.code == 0
    (problem,) = [line for line in result.said if "was not preloaded" in line]
    assert problem.startswith(
        "  small:1b was not preloaded: Ollama put it into RAM, though 22.0 GB of VRAM were free: "
        "the server uses no GPU, or"
    )
    assert server.ps() == []


def test_nothing_to_load(project: Project, server: OllamaServer) -> None:
    """Settings that contradict each other are told before anything happens."""
    result = project.pytest(*ON)
    assert result.code == 4
    assert "name the models in gpu_share_ollama_models" in result.err
    result = project.pytest(
        *ON, "-o", f"{MODELS}{QWEN}", "-o", "gpu_share_enable_ollama_detection=no"
    )
    assert result.code == 4
    assert "no request is made to Ollama" in result.err
    assert server.requests == []


def test_plan_loads_nothing(project: Project, server: OllamaServer) -> None:
    """`pytest-gpushare plan` and simulated devices: what would be, by questions alone."""
    project.file(
        "pytest.ini",
        f"[pytest]\ngpu_share_ollama_preload = true\n{MODELS.strip('=')} = {QWEN}\n",
    )
    code = "import sys; from pytest_gpushare.cli.main import main; sys.exit(main(['plan']))"
    result = project.command([sys.executable, "-c", code])
    assert (result.code, "2 GPU workers" in result.out) == (0, True), result.out + result.err
    simulated = project.pytest("--gpu-share", "--gpu-share-simulate=24GB:used=2GB", "-n1")
    assert (simulated.code, simulated.passed) == (0, 4), simulated.out
    questions = {"/api/version", "/api/ps", "/api/tags", "/api/show"}
    assert {request.path for request in server.requests} == questions


def test_interrupt(project: Project, server: OllamaServer) -> None:
    """Ctrl-C is heard while a model is being loaded, which ends the load."""
    server.scheduler.settings = type(server.scheduler.settings)(load_delay=60.0)
    command = inner_command(*ON, "-o", f"{MODELS}{QWEN}")
    with child_process(
        command,
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: changes(server))
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "gpu-share: interrupted before the tests" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - began < 30
    wait_for(lambda: server.ps() == [])


@pytest.mark.parametrize("mode", ["silent", "drip-body", "status-503", "status-403", "huge"])
def test_faulty_server(mode: str, project: Project, machine: Machine) -> None:
    """One that does not even tell what it holds is not asked to load anything."""
    with FaultyServer(mode) as server:
        began = time.monotonic()
        result = project.pytest(*ON, "-n1", "-o", f"{MODELS}{QWEN}", OLLAMA_HOST=server.host)
        took = time.monotonic() - began
        assert all(path in ("/api/version", "/api/ps") for path in server.paths)
    assert (result.code, result.passed) == (0, 4), result.out + result.err
    assert f"  {QWEN} was not preloaded: Ollama at {server.host} cannot load it:" in result.out
    assert took < 60


def test_progress_line(project: Project, server: OllamaServer) -> None:
    """A terminal shows that something goes on; the line is gone afterwards."""
    pty = pytest.importorskip("pty")
    server.scheduler.settings = type(server.scheduler.settings)(load_delay=1.0)
    project.write(test_project=TRIVIAL)
    master, slave = pty.openpty()
    command = inner_command(*ON, "-o", f"{MODELS}small:1b")
    with child_process(
        command, cwd=project.path, env=project.environment, stdout=subprocess.DEVNULL, stderr=slave
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.wait(60) == 0
    os.close(master)
    assert b"\rgpu-share: Ollama loads small:1b into VRAM, 0 s" in shown
    assert shown.endswith(b" \r")
