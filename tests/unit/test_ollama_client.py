"""The HTTP client beside servers that close, drip, hang and present any certificate."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trustme
from simulator.ollama import FaultyServer, OllamaServer

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.catalog import ask
from pytest_gpushare.ollama.client import Connection, NonsenseError, Response, UnreachableError

from ..acceptance.conftest import closed_port

Serve = Callable[[socket.socket], None]
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"


@contextmanager
def serving(*connections: Serve) -> Iterator[str]:
    """A server that treats its first connections so, one after the other, and takes no more."""

    def serve() -> None:
        for treat in connections:
            with listener.accept()[0] as connection:
                try:
                    treat(connection)
                except OSError:
                    pass  # the client hung up, or refused the certificate

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (part := connection.recv(65536)):
        data += part
    return data


def drip(connection: socket.socket, part: bytes) -> None:
    """A part every 50 ms, until the client hangs up; a minute at most."""
    for _ in range(1200):
        connection.sendall(part)
        time.sleep(0.05)


def get(url: str, limit: float = 5, number: int = 1) -> list[Response]:
    """So many requests over one connection."""
    with closing(Connection(parse_address(url))) as connection:
        return [connection.get("/", time.monotonic() + limit) for _ in range(number)]


@contextmanager
def in_time() -> Iterator[None]:
    """Well before the server ends, though it may be a while on a busy machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    """A server's side, with a certificate for localhost and 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trusted(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return


# --- servers that close their connections ---


@pytest.mark.parametrize("announced", [b"", b"Connection: close\r\n"])
def test_a_server_may_close_after_each_answer(announced: bytes) -> None:
    """Whether it says so or not, the next request opens a connection of its own."""

    def once(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(ANSWER + announced + b"\r\n{}")

    with serving(once, once, once) as host, closing(Connection(parse_address(host))) as connection:
        for _ in range(3):
            answer = connection.get("/", time.monotonic() + 5)
            assert (answer.decoded(), answer.peer) == ({}, "127.0.0.1")
            # The end of the connection has arrived, as it has between two questions.
            time.sleep(0.05)


def test_a_body_that_ends_with_the_connection() -> None:
    def once(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n[1]")

    with serving(once, once) as host:
        assert [answer.decoded() for answer in get(host, number=2)] == [[1], [1]]


def test_one_connection_for_several_requests() -> None:
    accepted: list[bool] = []

    def twice(connection: socket.socket) -> None:
        accepted.append(True)
        for _ in range(2):
            read_request(connection)
            connection.sendall(ANSWER + b"\r\n{}")

    with serving(twice) as host:
        answers = get(host, number=2)
    assert len(accepted) == 1
    assert [answer.decoded() for answer in answers] == [{}, {}]


# --- limits ---


@pytest.mark.parametrize("mode", ["silent", "drip-header", "drip-body"])
def test_the_limit_is_for_the_whole_exchange(mode: str) -> None:
    """Nobody else ends it."""
    with FaultyServer(mode) as server, in_time(), pytest.raises(TimeoutError):
        get(server.host, 0.4)


@pytest.mark.parametrize("part", [b"", b"\x00"])
def test_a_handshake_that_hangs_or_drips(part: bytes) -> None:
    def handshake(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"\x16\x03\x03\x40\x00")
        # Silent, it waits for the end of the connection.
        drip(connection, part) if part else connection.recv(1)

    with serving(handshake) as host, in_time(), pytest.raises(TimeoutError):
        get(f"https://{host}", 0.4)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-Slow: ", ANSWER[:-3] + b"9999\r\n\r\n"])
def test_what_drips_over_tls(start: bytes, tls: ssl.SSLContext, trusted: None) -> None:
    def serve(connection: socket.socket) -> None:
        with tls.wrap_socket(connection, server_side=True) as secure:
            read_request(secure)
            secure.sendall(start)
            drip(secure, b"z")

    with serving(serve) as host, in_time(), pytest.raises(TimeoutError):
        get(f"https://{host}", 0.4)


def test_hanging_up_from_another_thread() -> None:
    """It ends a request under way at once, and there is no next one."""
    with FaultyServer("drip-header") as server, in_time():
        connection = Connection(parse_address(server.host))
        stop = threading.Timer(1.0, connection.hang_up)
        stop.start()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                connection.get("/", time.monotonic() + 60)
        connection.close()
        stop.join(10)
        assert server.connections == 1


def test_a_limit_that_has_passed() -> None:
    with FaultyServer("garbage") as server:
        with pytest.raises(TimeoutError):
            get(server.host, -1)
        assert server.connections == 0


def test_an_endless_header_is_not_taken_in() -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-More: " + b"z" * 8000 + b"\r\n")

    with serving(serve) as host, pytest.raises(NonsenseError, match="no HTTP answer"):
        get(host)


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "[::1", "ho st", "\u00fc" * 80])
def test_hosts_that_are_none(host: str) -> None:
    """A host that cannot be called is a server that is not reached, whatever is wrong with it."""
    found = ask(parse_address(f"http://{host}:1"), 5)
    assert (found.answered, found.reachable) == (False, False)
    assert found.problem.startswith(("cannot be reached: ", "nothing listens there"))


# --- nothing shows ---


@pytest.mark.parametrize("secure", [False, True])
def test_no_line_in_the_log(
    secure: bool, tls: ssl.SSLContext, trusted: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a test and the guard share a process, the test's log holds what the test did."""
    caplog.set_level(logging.DEBUG)
    with OllamaServer(None, {}, tls=tls if secure else None) as server:
        assert ask(parse_address(server.url), 5).answered
        logging.getLogger("httpcore.connection").debug("what a user's own client logs")
    assert [record.getMessage() for record in caplog.records] == ["what a user's own client logs"]


# --- certificates ---


def test_a_private_authority(tls: ssl.SSLContext, trusted: None) -> None:
    with OllamaServer(None, {"m": "1GB"}, tls=tls) as server:
        server.load("m")
        found = ask(parse_address(server.url), 5)
    assert (found.answered, found.problem, found.version) == (True, "", "0.33.0")
    assert (found.on_this_host, [model.name for model in found.models]) == (True, ["m:latest"])


def test_a_certificate_for_another_host(authority: trustme.CA, trusted: None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("ollama.example").configure_cert(context)
    with OllamaServer(None, {}, tls=context) as server:
        found = ask(parse_address(server.url), 5)
        assert server.requests == []
    assert found.problem.startswith("cannot be reached: ")
    assert "CERTIFICATE_VERIFY_FAILED" in found.problem


@pytest.mark.parametrize("file", ["", "none.pem"])
def test_unknown_authority(
    file: str, tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is sent; a file that is not there makes nobody trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / file) if file else "")
    with OllamaServer(None, {}, tls=tls) as server:
        found = ask(parse_address(server.url), 5)
        assert server.requests == []
    assert found.problem.startswith("cannot be reached: ")
    assert "CERTIFICATE_VERIFY_FAILED" in found.problem
    assert (found.answered, found.reachable) == (False, False)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_listens(scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{closed_port()}"
    with pytest.raises(UnreachableError, match="^$"):
        get(url)
    found = ask(parse_address(url), 5)
    assert (found.problem, found.reachable) == ("nothing listens there", False)
