"""An Ollama behind https, with a certificate of a private authority made for the test."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from simulator import Machine
from simulator.ollama import OllamaServer

from .conftest import Project

AUTHORITY = trustme.CA()


@pytest.fixture
def server(project: Project, machine: Machine) -> Iterator[OllamaServer]:
    """An Ollama with a loaded model, which OLLAMA_HOST names by its https address."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("localhost", "127.0.0.1").configure_cert(tls)
    with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}, tls=tls) as running:
        running.load("qwen2.5:14b")
        running.requests.clear()
        project.environment["OLLAMA_HOST"] = running.url
        yield running


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The authority's certificate, alone in a directory."""
    path = tmp_path / "authorities" / "authority.pem"
    path.parent.mkdir()
    AUTHORITY.cert_pem.write_to_path(str(path))
    return path


def is_answered(project: Project, server: OllamaServer, **environment: str) -> None:
    """The plan goes by what the server holds, and the monitor follows it until the end."""
    options = ("gpu_share_ollama_models=qwen2.5:14b", "gpu_share_ollama_timeout_s=20")
    result = project.pytest(
        "--gpu-share", *(part for option in options for part in ("-o", option)), **environment
    )
    assert (result.code, result.passed, result.err) == (0, 4, "")
    assert "  VRAM: Ollama reservation 12.0 GB (10.8 GB of it resident), " in result.out
    assert f"  Ollama 0.33.0 at {server.host}: qwen2.5:14b 10.8 GB, 100 % on GPU" in result.said
    assert "Ollama kept qwen2.5:14b on the GPU" in result.out
    assert [request.path for request in server.requests][:4] == [
        "/api/version", "/api/ps", "/api/tags", "/api/show",
    ]  # fmt: skip


def test_file_of_a_private_authority(
    project: Project, server: OllamaServer, certificate: Path
) -> None:
    """SSL_CERT_FILE names it."""
    is_answered(project, server, SSL_CERT_FILE=str(certificate))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl computes the file's name")
def test_directory_of_a_private_authority(
    project: Project, server: OllamaServer, certificate: Path
) -> None:
    """SSL_CERT_DIR names the directory, where OpenSSL finds it by its hash."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)]
    name = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    certificate.rename(certificate.parent / f"{name.strip()}.0")
    is_answered(project, server, SSL_CERT_DIR=str(certificate.parent))


def test_unknown_authority(project: Project, server: OllamaServer) -> None:
    """Nothing is sent, the reservation stands, and the line says why."""
    patient = ("-o", "gpu_share_ollama_timeout_s=20")
    result = project.pytest("--gpu-share", "-n1", *patient, SSL_CERT_FILE=None, SSL_CERT_DIR=None)
    assert (result.code, result.passed, result.err) == (0, 4, "")
    line = next(line for line in result.said if "Ollama at" in line)
    assert line.startswith(f"  Ollama at {server.host}: cannot be reached: ")
    assert "CERTIFICATE_VERIFY_FAILED" in line
    assert line.endswith("; its VRAM reservation stands")
    assert server.requests == []
