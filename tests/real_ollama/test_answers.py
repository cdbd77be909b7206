"""A server without a GPU: its answers are understood, and its models are left as they are."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from simulator import Device
from simulator.child import child_process
from simulator.ollama.reloads import REQUESTS

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.catalog import ask_models, loaded_models
from pytest_gpushare.ollama.client import connect

from ..acceptance.conftest import Project
from .conftest import Start
from .gguf import Shape
from .server import AnswerError, Installation, RealOllama
from .shapes import GEMMA3, LLAMA, MIXTURE, QWEN2, TINY

PRELOAD = ("--gpu-share", "-o", "gpu_share_ollama_preload=true")
QUESTIONS = {("GET", "/api/version"), ("GET", "/api/ps"), ("GET", "/api/tags")}


@pytest.fixture
def server(start: Start) -> RealOllama:
    """On the CPU, with models that answer."""
    return start()


def keeps(server: RealOllama, name: str) -> float:
    """For how many more seconds the server keeps a model."""
    text = re.sub(r"\.(\d{6})\d*", r".\1", server.entry(name)["expires_at"])
    return (datetime.fromisoformat(text) - datetime.now(timezone.utc)).total_seconds()


def test_version_and_models(server: RealOllama) -> None:
    """What the client makes of the answers is what they say."""
    assert re.match(r"\d+\.\d+\.\d+", server.version)
    server.load("tiny", num_ctx=1024)
    with contextlib.closing(connect(parse_address(server.host), lambda _: None)) as connection:
        answer = loaded_models(connection, time.monotonic() + 60)
    entry = server.entry("tiny")
    (model,) = answer.models
    assert answer.odd == ()
    assert (model.name, model.size, model.on_gpu) == ("tiny:latest", entry["size"], 0)
    assert (model.digest, model.context) == (entry["digest"], 1024)
    assert model.expires_at == entry["expires_at"]


SERVE = """
import sys, time
from pathlib import Path
from real_ollama.server import Installation, RealOllama
with RealOllama(Installation(sys.argv[1], Path(sys.argv[2]), None)) as server:
    server.load("tiny")
    print(server.port, server._process.pid, *server.runners(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_the_tests(number: signal.Signals, library: Installation) -> None:
    """Also where their process is killed: neither it nor its runner is left."""
    command = [sys.executable, "-c", SERVE, library.executable, str(library.directory)]
    tests = Path(__file__).parents[1]
    with child_process(command, cwd=tests, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, *pids = (int(word) for word in process.stdout.readline().split())
        assert len(pids) == 2
        process.send_signal(number)
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < until, "a process of the server is left"
            time.sleep(0.05)
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("name", "shape"), [("tiny", TINY), ("q3", QWEN2), ("l1", LLAMA), ("g3", GEMMA3),
                        ("moe", MIXTURE)],
)  # fmt: skip
def test_metadata(server: RealOllama, name: str, shape: Shape) -> None:
    """`/api/tags` and `/api/show` give the whole shape."""
    (facts,) = ask_models(parse_address(server.host), [name], time.monotonic() + 60, lambda _: None)
    assert (facts.problem, facts.is_missing, facts.is_remote) == ("", False, False)
    assert facts.info is not None
    assert facts.tensors is not None
    assert facts.info["general.architecture"] == shape.architecture
    assert facts.info[f"{shape.architecture}.block_count"] == shape.layers
    assert facts.info[f"{shape.architecture}.embedding_length"] == shape.embedding
    assert re.fullmatch("[0-9a-f]{64}", facts.blob)
    assert (facts.tensors.in_host_ram > 0) != shape.is_tied
    assert facts.file_bytes is not None
    assert 0 < facts.tensors.size + facts.tensors.in_host_ram <= facts.file_bytes


def test_preload_gives_the_server_back(server: RealOllama, project: Project) -> None:
    """Loaded and kept with the server's own duration; nothing is left to restore."""
    result = project.pytest(*PRELOAD, "-o", "gpu_share_ollama_models=tiny")
    assert (result.code, result.passed) == (0, 4), result.out
    assert 0 < keeps(server, "tiny") <= 300
    loads = [seen for seen in server.requests() if seen.path == "/api/generate"]
    assert [seen.status for seen in loads] == [200]


def test_preload_leaves_what_is_loaded(server: RealOllama, project: Project) -> None:
    """Not one request that could change it, and the same process."""
    server.load("tiny", keep_alive="20m", num_ctx=512)
    before, processes, asked = server.ps(), server.runners(), len(server.requests())
    result = project.pytest(*PRELOAD, "-o", "gpu_share_ollama_models=tiny")
    assert (result.code, result.passed) == (0, 4), result.out
    assert (server.ps(), server.runners()) == (before, processes)
    assert all(seen.path != "/api/generate" for seen in server.requests()[asked:])


def test_alias(server: RealOllama, project: Project) -> None:
    """A second name of a loaded model is served by the same process, and not loaded again."""
    server.post("/api/create", {"model": "alias", "from": "tiny", "stream": False})
    server.load("tiny", keep_alive="7m")
    before, processes = server.ps(), server.runners()
    failing = ("-o", "gpu_share_ollama_preload_failed=fail")
    result = project.pytest(*PRELOAD, *failing, "-o", "gpu_share_ollama_models=alias")
    assert (result.code, result.passed) == (0, 4), result.out
    assert (server.ps(), server.runners()) == (before, processes)


def test_missing_model(server: RealOllama, project: Project) -> None:
    """It is named, once, with the command that gets it; the server is asked for no load."""
    result = project.pytest(*PRELOAD, "-o", "gpu_share_ollama_models=nosuch:1b")
    assert (result.code, result.passed) == (0, 4), result.out
    assert result.out.count("ollama pull nosuch:1b") == 1
    assert {(seen.method, seen.path) for seen in server.requests()} <= QUESTIONS
    with pytest.raises(AnswerError, match="not found") as caught:
        server.load("nosuch:1b")
    assert caught.value.status == 404


@pytest.mark.timeout(600)
def test_ordinary_runs_change_nothing(server: RealOllama, project: Project) -> None:
    """20 runs beside a loaded model: the same answer, the same process, GETs."""
    server.load("tiny", keep_alive="2h", num_ctx=512)
    before, processes, asked = server.ps(), server.runners(), len(server.requests())
    auto = ("-o", "gpu_share_ollama_vram_reservation_mb=auto")
    for number in range(20):
        named = (*auto, "-o", "gpu_share_ollama_models=tiny tiny-b") if number % 2 else ()
        result = project.pytest("--gpu-share", "-n2", *named)
        assert (result.code, result.passed) == (0, 4), result.out
    assert before == server.ps()
    assert server.runners() == processes
    made = {(seen.method, seen.path) for seen in server.requests()[asked:]}
    assert made <= QUESTIONS | {("POST", "/api/show")}
    assert ("POST", "/api/show") in made


def test_what_reloads_a_model(server: RealOllama) -> None:
    """What replaces its process, on which the guide and the simulated server rely."""
    for body, reloads, back in REQUESTS:
        server.unload_all()
        processes = []
        for sent in ({}, body, {}):
            request = {"model": "tiny", "prompt": "a", "stream": False, **sent}
            options = {"num_predict": 1, **request.get("options", {})}
            server.post("/api/generate", request | {"options": options})
            processes.append(server.runners())
        changed = (processes[1] != processes[0], processes[2] != processes[1])
        assert changed == (reloads, back), body


def test_other_paths_use_the_same_process(server: RealOllama) -> None:
    """Those of OpenAI and Anthropic, and /api/chat, with the context that it was loaded with."""
    server.load("tiny")
    first = server.runners()
    messages = [{"role": "user", "content": "a"}]
    server.post("/api/chat", {"model": "tiny", "messages": messages, "stream": False,
                              "options": {"num_predict": 1}})  # fmt: skip
    for path in ("/v1/chat/completions", "/v1/messages"):
        server.post(path, {"model": "tiny", "messages": messages, "max_tokens": 1})
    server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
    # `options` are no part of OpenAI's body: a context there is ignored.
    server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 1,
                                         "options": {"num_ctx": 512}})  # fmt: skip
    assert server.runners() == first


def test_report_of_a_server_without_a_gpu(
    server: RealOllama, project: Project, machine_with: object
) -> None:
    """A model in RAM while VRAM is free: the cause is the server, not the tests."""
    assert callable(machine_with)
    machine_with(Device(total="24GB", used="2GB"))
    server.load("tiny", keep_alive="10m")
    result = project.pytest("--gpu-share", "-n2", "--gpu-share-report=r.json")
    assert (result.code, result.passed) == (0, 4), result.out
    document = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    assert document["ollama"]["spilled_under_tests"] is False
    assert "does not fit" not in result.out
