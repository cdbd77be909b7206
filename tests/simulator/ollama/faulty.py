"""Servers that answer what no Ollama would: for clients that must survive it."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

Connection = socket.socket

LIMIT = 600.0
"""Seconds for which a connection is kept that nobody closes."""
Answer = Callable[["FaultyServer", Connection], None]

BOMB_BYTES = 512 << 20
"""What the gzip bomb unpacks to: half a megabyte of zeros, a thousandfold."""


class FaultyServer:
    """One faulty server on 127.0.0.1; a context manager.

    connections: how many clients have connected.
    paths: the paths that were asked for, where a request was read.
    redirects: how many clients have contacted the target of the redirect.
    """

    def __init__(self, mode: str) -> None:
        """Start answering in *mode*, one of `FAULTS`."""
        if mode not in FAULTS:
            raise ValueError(f"unknown fault {mode!r}; there are {', '.join(FAULTS)}")
        if mode == "gzip-bomb":
            # Packing takes a while, which is not to count against the limit of who asks.
            _bomb_body()
        self.mode = mode
        self.connections = 0
        self.paths: list[str] = []
        self.redirects = 0
        self.closed = threading.Event()
        self._listeners: list[socket.socket] = []
        self._open: set[Connection] = set()
        self._guard = threading.Lock()
        self.port = self._listen(self._faulty)
        self.redirect_port = self._listen(self._redirected) if mode == "redirect" else 0

    def __enter__(self) -> FaultyServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def host(self) -> str:
        """Host and port, as in OLLAMA_HOST."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{self.host}"

    def close(self) -> None:
        """Drop every connection and stop listening; a second time does nothing."""
        if self.closed.is_set():
            return
        self.closed.set()
        for listener in self._listeners:
            # A plain close would leave a thread waiting in accept.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._guard:
            for connection in self._open:
                _hang_up(connection)

    def read_request(self, connection: Connection) -> None:
        """Read one request up to the end of its header, and note its path."""
        data = b""
        while b"\r\n\r\n" not in data and (part := connection.recv(65536)):
            data += part
        # A client that has given up meanwhile has asked for nothing.
        if data.count(b" ") > 1:
            self.paths.append(data.split(b" ")[1].decode())

    def drip(self, connection: Connection, parts: Iterator[bytes], pause: float = 0.1) -> None:
        """Send a part every *pause* seconds until somebody hangs up: no read times out."""
        for part in parts:
            connection.sendall(part)
            if self.closed.wait(pause):
                return

    def _listen(self, answer: Callable[[Connection], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(LIMIT)
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, answer), daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, answer: Callable[[Connection], None]) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection, answer), daemon=True).start()

    def _serve(self, connection: Connection, answer: Callable[[Connection], None]) -> None:
        with self._guard:
            self._open.add(connection)
        try:
            answer(connection)
        except OSError:
            pass  # the client went away, as a good one does
        finally:
            with self._guard:
                self._open.discard(connection)
            _hang_up(connection)
            connection.close()

    def _faulty(self, connection: Connection) -> None:
        self.connections += 1
        connection.settimeout(LIMIT)
        FAULTS[self.mode](self, connection)

    def _redirected(self, connection: Connection) -> None:
        self.redirects += 1
        self.read_request(connection)
        connection.sendall(_response(b'{"version": "0.33.0", "models": []}'))


def _hang_up(connection: Connection) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was the other side that did


def _response(
    body: bytes, *headers: str, status: str = "200 OK", length: int | None = None
) -> bytes:
    kind = [] if any(h.lower().startswith("content-type") for h in headers) else [JSON]
    size = f"Content-Length: {len(body) if length is None else length}"
    lines = [f"HTTP/1.1 {status}", *kind, *headers, size, "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


JSON = "Content-Type: application/json; charset=utf-8"


def _bytes(body: bytes, *headers: str, **options: Any) -> Answer:
    def answer(server: FaultyServer, connection: Connection) -> None:
        server.read_request(connection)
        connection.sendall(_response(body, *headers, **options))

    return answer


def _ps(**changes: Any) -> Answer:
    """Answer a /api/ps with one model, some of its fields changed, or left out where None."""
    entry = {
        "name": "m:latest",
        "model": "m:latest",
        "size": 1 << 30,
        "digest": "0" * 64,
        "details": {"family": "llama", "families": None},
        "expires_at": "2026-08-21T10:00:00.123456789+02:00",
        "size_vram": 1 << 30,
        "context_length": 4096,
    }
    entry = {key: value for key, value in {**entry, **changes}.items() if value is not None}
    return _bytes(json.dumps({"version": "0.33.0", "models": [entry]}).encode())


def _silent(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    server.closed.wait(LIMIT)


def _drip_header(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    connection.sendall(f"HTTP/1.1 200 OK\r\n{JSON}\r\nX-Slow: ".encode())
    server.drip(connection, itertools.repeat(b"z"))


def _drip_body(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    connection.sendall(_response(b"", length=10**6))
    server.drip(connection, itertools.repeat(b" "))


def _huge(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    # No length: the body ends when the connection does, which it never does.
    connection.sendall(f"HTTP/1.1 200 OK\r\n{JSON}\r\n\r\n".encode() + b'{"models": [')
    while not server.closed.is_set():
        connection.sendall(b"[], " * 16384)


def _redirect(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    target = f"Location: http://127.0.0.1:{server.redirect_port}/api/version"
    connection.sendall(_response(b"", target, status="302 Found"))


def _close(server: FaultyServer, connection: Connection) -> None:
    """Hang up without a word."""


def _bomb(server: FaultyServer, connection: Connection) -> None:
    server.read_request(connection)
    connection.sendall(_response(_bomb_body(), "Content-Encoding: gzip"))


@cache
def _bomb_body() -> bytes:
    # Several members make one gzip stream; one is packed and sent many times.
    member = gzip.compress(b" " * (8 << 20))
    return gzip.compress(b'{"version": "0.33.0", "models": []}') + member * (BOMB_BYTES >> 23)


def _status(status: str) -> Answer:
    return _bytes(json.dumps({"error": status[4:].lower()}).encode(), status=status)


_HUGE_NUMBER = json.loads("9" * 400)

FAULTS: dict[str, Answer] = {
    "silent": _silent,
    "drip-header": _drip_header,
    "drip-body": _drip_body,
    "garbage": _bytes(b"\x00\xff{]not json"),
    "html": _bytes(b"<html><body>Welcome</body></html>", "Content-Type: text/html"),
    "huge": _huge,
    "redirect": _redirect,
    "status-400": _status("400 Bad Request"),
    "status-403": _bytes(b"", status="403 Forbidden"),
    "status-404": _status("404 Not Found"),
    "status-500": _status("500 Internal Server Error"),
    "status-503": _status("503 Service Unavailable"),
    "wrong-types": _ps(name=7, size="much", size_vram=[1], expires_at={}, details="none"),
    "not-an-object": _bytes(b'["models", null, 3]'),
    "null-models": _bytes(b'{"version": null, "models": null}'),
    "huge-numbers": _ps(size=_HUGE_NUMBER, size_vram=_HUGE_NUMBER, context_length=_HUGE_NUMBER),
    "infinite-numbers": _bytes(
        b'{"version": "0.33.0", "models": [{"name": "m", "size": 1e999, "size_vram": NaN}]}'
    ),
    "negative-sizes": _ps(size=-1, size_vram=-(1 << 40)),
    "missing-fields": _ps(name=None, model=None, size=None, size_vram=None, expires_at=None),
    "empty-object": _bytes(b"{}"),
    "close": _close,
    "gzip-bomb": _bomb,
    "short-body": _bytes(b'{"models": [', length=10**6),
    "bad-length": _bytes(b"{}", length=-5),
    "deep-json": _bytes(b'{"version": "0.33.0", "models": ' + b"[" * 200_000),
    "not-http": lambda _server, connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
}
"""The modes of FaultyServer."""
