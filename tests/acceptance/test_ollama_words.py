"""What is said of a server that cannot be asked, and of a model that changes in mid-run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.ollama import FaultyServer, Model, OllamaServer

from .conftest import Project
from .test_cli_doctor import COMMAND, DoctorOutput, doctor
from .test_localhost import with_hosts
from .test_preload import MODELS, ON, changes

OllamaWith = Callable[..., OllamaServer]

# A test uses the model, and then runs past a look at it that finds less than two thirds of its
# keep-alive left. A look is taken every third, whenever the test was started.
USE = """
    import json, os, time, urllib.request

    def test_it():
        time.sleep(3)
        body = {"model": "small:1b", "prompt": "a", "stream": False, "options": @OPTIONS}
        url = f"http://{os.environ['OLLAMA_HOST']}/api/generate"
        request = urllib.request.Request(url, data=json.dumps(body).encode())
        if @IS_ASKED:
            urllib.request.urlopen(request, timeout=60).read()
        time.sleep(13.5)
"""
RENEWED = ("/api/generate", {"model": "small:1b", "keep_alive": "18s", "stream": False})


def test_doctor_beside_a_server_that_hangs(project: Project, machine: Machine) -> None:
    """It is there, and does not answer: starting it would not help."""
    with FaultyServer("silent") as server:
        report = doctor(project, OLLAMA_HOST=server.host)
    assert report.level("ollama-hangs") == "look"
    assert "raise gpu_share_ollama_timeout_s" in report.fix("ollama-hangs")
    assert "restart it" in report.fix("ollama-hangs")
    assert "ollama serve" not in report.result.out


def test_host_check(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """A name of /etc/hosts, as that of a Compose service, is refused: doctor says why."""
    server = ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    hosts = project.file("hosts", "127.0.0.1 localhost gpu-box\n")
    host = f"gpu-box:{server.port}"
    report = DoctorOutput(project.command(with_hosts(hosts, *COMMAND, "--json"), OLLAMA_HOST=host))
    assert "status 403" in report.fact("ollama-host-check")
    assert "IP address" in report.fix("ollama-host-check")
    assert ".internal" in report.fix("ollama-host-check")
    command = with_hosts(hosts, *inner_command("--gpu-share"))
    result = project.command(command, OLLAMA_HOST=host, PYTEST_XDIST_AUTO_NUM_WORKERS="2")
    assert (result.code, result.passed) == (0, 4), result.out
    assert any(f"Ollama at {host}" in line and "status 403" in line for line in result.said)


# They wait nearly all the time: one after the other, and while others use the CPUs.
@pytest.mark.xdist_group("keeping-a-model")
@pytest.mark.parametrize(
    ("is_asked", "options", "hides", "why"),
    [
        (False, {}, False, ""),
        (True, {}, False, ""),
        (True, {"num_thread": 1}, False, "another client reloaded it"),
        (True, {"num_ctx": 512}, False, "another client loaded it with other settings"),
        (False, {}, True, ""),
        (True, {}, True, "another client used it, and whether it was reloaded cannot be seen here"),
    ],
    ids=["unused", "used", "reloaded", "context", "unused, hidden", "used, hidden"],
)
def test_keeping_a_preloaded_model(
    is_asked: bool,
    options: dict[str, int],
    hides: bool,
    why: str,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: OllamaWith,
) -> None:
    """Renewed with the server's own keep-alive while it is ours; else no request is sent for it."""
    machine = machine_with(Device(total="24GB", used="2GB"))
    if hides:
        machine.inject("nvmlDeviceGetComputeRunningProcesses*", code=3)
    server = ollama_with([Model("small:1b", "1GB")], keep_alive="18s")
    use = USE.replace("@OPTIONS", repr(options)).replace("@IS_ASKED", str(is_asked))
    project.write(test_project=use)
    result = project.pytest(*ON, "-n1", "-o", f"{MODELS}small:1b")
    assert (result.code, result.passed) == (0, 1), result.out
    ours = [change for change in changes(server) if "prompt" not in change[1]]
    assert ours[0] == ("/api/generate", {"model": "small:1b", "stream": False})
    assert (ours[1:] == []) == bool(why)
    assert all(change == RENEWED for change in ours[1:])
    told = [line for line in result.said if "not kept loaded any more" in line]
    assert [line.partition("any more: ")[2] for line in told] == ([why] if why else [])


def test_small_sizes(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """MB where GB would be 0.0, in header and verdict."""
    tiny = Model("tiny:1b", "60MB", layers=2, heads=4, kv_heads=2, key_length=16, value_length=16,
                 embedding_length=64)  # fmt: skip
    ollama_with([tiny], load="tiny:1b")
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 4), result.out
    told = [line for line in result.said if "tiny:1b" in line]
    assert len(told) == 2
    assert all("60 MB" in line for line in told), told
    assert "0.0 GB" not in result.out
