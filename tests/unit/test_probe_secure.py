"""Over https: a certificate that nobody vouches for is refused, before anything is sent."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.catalog import ask

from ..acceptance.conftest import closed_port


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_unknown_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    received: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        try:
            with context.wrap_socket(connection, server_side=True) as secure:
                received.append(secure.recv(100))
        except (ssl.SSLError, OSError):
            received.append(b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        found = ask(parse_address(f"https://127.0.0.1:{listener.getsockname()[1]}"), 5)
        thread.join(10)
    assert found.problem.startswith("cannot be reached: ")
    assert "CERTIFICATE_VERIFY_FAILED" in found.problem
    assert (found.answered, found.reachable, received) == (False, False, [b""])


def test_nothing_listens() -> None:
    found = ask(parse_address(f"https://127.0.0.1:{closed_port()}"), 5)
    assert (found.problem, found.reachable) == ("nothing listens there", False)
