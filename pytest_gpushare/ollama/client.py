"""The HTTP client: one request to a server and its answer, bounded in time and size.

The only module that imports httpx, and only where a request is made: a run that did not ask for
the plugin, or that asks no server, does not load it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.ollama.address import Address
from pytest_gpushare.text import printable
from pytest_gpushare.units import MB

if TYPE_CHECKING:
    import ssl

    import httpx


MOST_BYTES = MB
"""The largest answer that is read."""

_MOST_WORDS = 65_536

_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "pytest-gpushare"}
_JSON = {"Content-Type": "application/json"}

# httpx and httpcore, on which it stands, log each step at level DEBUG in these.
_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11")


class NonsenseError(Exception):
    """An answer that an Ollama server would not give; the text says what was odd."""


class StatusError(NonsenseError):
    """An answer with another status than 200."""

    def __init__(self, path: str, status: int, words: str = "") -> None:
        super().__init__(f"{path} gives status {status}")
        self.status = status
        self.words = words
        """What the server says about it; empty where it says nothing."""


class UnreachableError(Exception):
    """No connection could be made; the text says why, empty where nothing listens."""


class Response(NamedTuple):
    """An answer with status 200 and a body that is not compressed."""

    path: str
    body: bytes
    peer: str | None
    """The address that gave it, where the connection has it."""

    def decoded(self) -> object:
        """The JSON in the body. Raises `NonsenseError` where there is none."""
        try:
            value: object = json.loads(self.body)
        except (ValueError, RecursionError):
            raise NonsenseError(f"{self.path} gives no JSON") from None
        return value


class Connection:
    """A connection to one server, for one request after the other, made by one thread.

    It uses httpx's transport without `httpx.Client`, which would follow the environment's
    proxies, send the password of a .netrc and log each request at level INFO, where the user's
    tests may look. So there are no redirects and no cookies either.
    """

    def __init__(self, address: Address) -> None:
        """Prepare a connection; it is made with the first request."""
        self._address = address
        self._transport: httpx.HTTPTransport | None = None
        self._socket: socket.socket | None = None
        self._peer: str | None = None
        self._is_hung_up = False
        self._lock = threading.Lock()

    def get(self, path: str, deadline: float) -> Response:
        """The answer, complete at `deadline` (on the monotonic clock).

        The whole exchange is bounded, not each read. Only the resolver of host names can exceed
        the limit: a caller that must not wait for it calls from a thread that it can leave.
        Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
        """
        return self._ask("GET", path, None, deadline, MOST_BYTES)

    def post(
        self, path: str, body: bytes, deadline: float, most_bytes: int = MOST_BYTES
    ) -> Response:
        """The answer to a body of JSON; no more than `most_bytes` of it are read."""
        return self._ask("POST", path, body, deadline, most_bytes)

    def post_lines(
        self,
        path: str,
        body: bytes,
        deadline: float,
        receive: Callable[[bytes], object],
        most_bytes: int,
    ) -> None:
        """The same, for an answer of lines that takes long: each is received as it comes."""
        self._ask("POST", path, body, deadline, most_bytes, receive)

    def hang_up(self) -> None:
        """End the request that is under way, and take no other; for any thread."""
        self._is_hung_up = True
        self._shut_down()

    def close(self) -> None:
        """Close the connection; for the thread that makes the requests."""
        if self._transport is not None:
            with _unlogged():
                self._transport.close()
        self._replace_socket(None)

    def _ask(
        self,
        method: str,
        path: str,
        sent: bytes | None,
        deadline: float,
        most_bytes: int,
        receive: Callable[[bytes], object] | None = None,
    ) -> Response:
        import httpx

        # The limits of httpx are for single reads, so a server that drips would never end.
        watchdog = threading.Timer(_left(deadline), self._shut_down)
        watchdog.daemon = True
        watchdog.start()
        try:
            with _unlogged():
                return self._exchange(method, path, sent, deadline, most_bytes, receive)
        except TimeoutError:
            raise
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            if (
                self._is_hung_up
                or time.monotonic() >= deadline
                or isinstance(error, httpx.TimeoutException)
            ):
                raise TimeoutError from None
            # A certificate that is not trusted is a connection that could not be made, too.
            if self._socket is None or isinstance(error, httpx.ConnectError):
                raise UnreachableError("" if _is_refused(error) else str(error)) from None
            why = str(error) or type(error).__name__
            raise NonsenseError(f"{path} gives no HTTP answer: {why}") from None
        finally:
            watchdog.cancel()

    def _exchange(
        self,
        method: str,
        path: str,
        sent: bytes | None,
        deadline: float,
        most_bytes: int,
        receive: Callable[[bytes], object] | None,
    ) -> Response:
        import httpx

        def trace(event: str, information: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                stream = information["return_value"]
                self._connected(stream.get_extra_info("socket"), deadline)

        if self._is_hung_up:
            raise TimeoutError
        if self._transport is None:
            self._transport = httpx.HTTPTransport(verify=_tls(self._address), trust_env=False)
        request = httpx.Request(
            method,
            f"{self._address.url}{path}",
            headers=_HEADERS if sent is None else {**_HEADERS, **_JSON},
            content=sent,
            extensions={"timeout": httpx.Timeout(_left(deadline)).as_dict(), "trace": trace},
        )
        response = self._transport.handle_request(request)
        try:
            _check(path, response, deadline)
            content = _read(path, response, deadline, most_bytes, receive)
            return Response(path, content, self._peer)
        finally:
            response.close()

    def _connected(self, connected: socket.socket, deadline: float) -> None:
        """Keep a handle of the socket by which any thread can end what is under way."""
        # A duplicate: TLS takes the original away, and httpx closes it when it likes.
        duplicate = connected.dup()
        self._replace_socket(duplicate)
        with contextlib.suppress(OSError):
            self._peer = str(duplicate.getpeername()[0])
        if self._is_hung_up or time.monotonic() >= deadline:
            self._shut_down()

    def _replace_socket(self, new: socket.socket | None) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = new

    def _shut_down(self) -> None:
        # Closing alone would leave a thread that waits for bytes waiting.
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


def connect(address: Address, opened: Callable[[Connection], object]) -> Connection:
    """A connection to the server; `opened` is given it before anything is sent."""
    connection = Connection(address)
    opened(connection)
    return connection


def load() -> None:
    """Import httpx now, so that its cost counts against no limit; an error is left to a request."""
    with contextlib.suppress(Exception), _unlogged():
        import httpx

        # It imports httpcore with the first transport.
        httpx.HTTPTransport(verify=_tls(Address("http", "", 0)), trust_env=False).close()


class _OthersOnly(threading.local):
    """A filter that drops what httpx logs in a thread while the code here uses it there."""

    is_in_use = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        del record
        return not self.is_in_use


_others_only = _OthersOnly()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    for name in _LOGGERS:
        # A second time does nothing.
        logging.getLogger(name).addFilter(_others_only)
    _others_only.is_in_use = True
    try:
        yield
    finally:
        _others_only.is_in_use = False


def _tls(address: Address) -> ssl.SSLContext:
    """The authorities that are trusted over https: SSL_CERT_FILE and SSL_CERT_DIR where set.

    Else the system's certificates and those that come with httpx: some builds of Python know of
    no others.
    """
    import ssl

    import httpx

    if address.scheme != "https":
        # httpx wants one. This one trusts nobody; reading the certificates takes long.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context()
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


def _check(path: str, response: httpx.Response, deadline: float) -> None:
    """Raises `NonsenseError` for an answer whose body is not worth reading."""
    if response.status_code != 200:
        raise StatusError(path, response.status_code, _words(path, response, deadline))
    if response.headers.get("content-encoding", "identity") not in ("", "identity"):
        raise NonsenseError(f"{path} gives a compressed answer that was not asked for")


def _words(path: str, response: httpx.Response, deadline: float) -> str:
    """What an Ollama server says of an error: `{"error": "..."}`."""
    try:
        answer = json.loads(_read(path, response, deadline, _MOST_WORDS))
    except (NonsenseError, ValueError, RecursionError):
        return ""
    words = answer.get("error") if isinstance(answer, dict) else None
    return printable(words, 300) if isinstance(words, str) else ""


def _read(
    path: str,
    response: httpx.Response,
    deadline: float,
    most_bytes: int,
    receive: Callable[[bytes], object] | None = None,
) -> bytes:
    """The body; where `receive` takes its lines, what is left behind the last of them."""
    import httpx

    body = bytearray()
    received = 0
    try:
        for chunk in response.iter_raw():
            body += chunk
            received += len(chunk)
            if received > most_bytes:
                raise NonsenseError(f"{path} gives more than {most_bytes // MB} MB")
            while receive is not None and b"\n" in body:
                line, _, rest = body.partition(b"\n")
                receive(bytes(line))
                body = rest
            _left(deadline)
    except (httpx.RemoteProtocolError, httpx.ReadError):
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and received < int(announced) and time.monotonic() < deadline:
            raise NonsenseError(f"{path} gives less than it announced") from None
        raise
    return bytes(body)


def _left(deadline: float) -> float:
    """Seconds until `deadline`. Raises `TimeoutError` where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _is_refused(error: BaseException | None) -> bool:
    """Whether nothing listens there, as the error or its cause says."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
