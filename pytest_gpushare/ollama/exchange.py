"""One request and its answer, with bounds on time and size.

Two ways with one face. Over plain http the standard library's client: a healthy start asks
two questions, and importing httpx for them took longer than all the rest of the start. Over
https httpx, which verifies certificates as its users configure them.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from pytest_gpushare.ollama.address import Address
from pytest_gpushare.units import MB

MOST_BYTES = MB
"""The largest answer that is read."""

HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "pytest-gpushare"}

JSON = {"Content-Type": "application/json"}
"""The header of a request with a body."""


class NonsenseError(Exception):
    """An answer that an Ollama server would not give; the text says what was odd."""


class StatusError(NonsenseError):
    """An answer with another status than 200."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path} gives status {status}")
        self.status = status


class UnreachableError(Exception):
    """No connection came about; the text says why, empty where nothing listens."""


class Answer(NamedTuple):
    """An answer with status 200 and a body that is not compressed."""

    body: bytes
    peer: str | None
    """The address that gave it, where the connection tells."""


class Connection(ABC):
    """A connection to one server, for one request after the other."""

    def get(self, path: str, deadline: float) -> Answer:
        """The answer, complete at `deadline` (on the monotonic clock).

        Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
        """
        return self._ask("GET", path, None, deadline, MOST_BYTES)

    def post(self, path: str, body: bytes, deadline: float, most_bytes: int = MOST_BYTES) -> Answer:
        """The answer to a body of JSON; no more than `most_bytes` of it are read."""
        return self._ask("POST", path, body, deadline, most_bytes)

    @abstractmethod
    def _ask(
        self, method: str, path: str, body: bytes | None, deadline: float, most_bytes: int
    ) -> Answer: ...

    @abstractmethod
    def close(self) -> None:
        """Hang up; called from another thread it ends a `get` that is under way."""


def connect(address: Address, opened: Callable[[Connection], object]) -> Connection:
    """A connection to the server; `opened` is given it before anything is sent."""
    if address.scheme == "https":
        from pytest_gpushare.ollama.secure import SecureConnection

        connection: Connection = SecureConnection(address)
    else:
        connection = PlainConnection(address)
    opened(connection)
    return connection


def left(deadline: float) -> float:
    """Seconds until `deadline`. Raises `TimeoutError` where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def check(path: str, status: int, encoding: str | None) -> None:
    """Raises `NonsenseError` for an answer whose body is not worth reading."""
    if status != 200:
        raise StatusError(path, status)
    if (encoding or "identity") != "identity":
        raise NonsenseError(f"{path} gives a compressed answer that was not asked for")


class PlainConnection(Connection):
    """Over http: no proxy, no certificate store, no credentials, no redirects."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = http.client.HTTPConnection(address.host, address.port)
        self._socket: socket.socket | None = None
        self._peer: str | None = None

    def _ask(
        self, method: str, path: str, body: bytes | None, deadline: float, most_bytes: int
    ) -> Answer:
        self._open(deadline)
        try:
            return self._exchange(method, path, body, deadline, most_bytes)
        except TimeoutError:
            raise
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise NonsenseError(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """See `Connection.close`."""
        if self._socket is not None:
            # Closing alone would leave a thread that waits for bytes waiting.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def _open(self, deadline: float) -> None:
        if self._client.sock is not None:
            return
        self._client.timeout = left(deadline)
        try:
            self._client.connect()
        except TimeoutError:
            raise
        except ConnectionRefusedError:
            raise UnreachableError("") from None
        except (OSError, ValueError) as error:
            raise UnreachableError(str(error)) from None
        connected: socket.socket | None = self._client.sock
        self._socket = connected
        # Asked now: the client closes its socket as soon as the server announces an end.
        if connected is not None:
            with contextlib.suppress(OSError):
                self._peer = str(connected.getpeername()[0])

    def _exchange(
        self, method: str, path: str, sent: bytes | None, deadline: float, most_bytes: int
    ) -> Answer:
        assert self._socket is not None
        self._socket.settimeout(left(deadline))
        headers = HEADERS if sent is None else {**HEADERS, **JSON}
        self._client.request(method, self._address.path + path, sent, headers)
        response = self._client.getresponse()
        check(path, response.status, response.getheader("Content-Encoding"))
        body = bytearray()
        while True:
            self._socket.settimeout(left(deadline))
            chunk = response.read1(65536)
            if not chunk:
                break
            body += chunk
            if len(body) > most_bytes:
                raise NonsenseError(f"{path} gives more than {most_bytes // MB} MB")
        if response.length:
            raise NonsenseError(f"{path} gives less than it announced")
        # Or the connection would not take the next request.
        response.close()
        return Answer(bytes(body), self._peer)
