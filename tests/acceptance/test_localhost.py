"""A name that resolves to several addresses, of which the server listens on one."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from inner_pytest import inner_command
from simulator import Machine
from simulator.ollama import OllamaServer

from .conftest import Project

# In a mount namespace of its own, with another /etc/hosts; an unprivileged user may make one.
IN_NAMESPACE = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'


def with_hosts(hosts: Path, *command: str) -> list[str]:
    """The command, run where /etc/hosts is that file; skips where that cannot be had."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", IN_NAMESPACE, "sh", str(hosts)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to give a command an /etc/hosts of its own")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=30)
    if tried.returncode:
        pytest.skip(f"no mount namespace: {tried.stderr.strip()}")
    return [*prefix, *command]


@pytest.mark.parametrize("address", ["::1", "127.0.0.1"])
def test_localhost(project: Project, machine: Machine, address: str) -> None:
    """`localhost` means ::1 and 127.0.0.1; a server on one of them is found, and its models."""
    hosts = project.file("hosts", "::1 localhost\n127.0.0.1 localhost\n")
    try:
        server = OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}, address=address)
    except OSError as error:
        pytest.skip(f"{address} cannot be listened on: {error}")
    with server:
        server.load("qwen2.5:14b")
        command = with_hosts(hosts, *inner_command("--gpu-share"))
        result = project.command(command, OLLAMA_HOST=f"localhost:{server.port}")
        asked = {request.path for request in server.requests[1:]}
    assert (result.code, result.passed, result.err) == (0, 4, ""), shlex.join(command)
    found = f"  Ollama 0.33.0 at localhost:{server.port}: qwen2.5:14b 10.8 GB, 100 % on GPU"
    assert found in result.said
    assert {"/api/version", "/api/ps"} <= asked
