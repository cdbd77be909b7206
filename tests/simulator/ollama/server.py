"""A simulated Ollama server: real HTTP, simulated VRAM, real processes that hold it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import sys
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..machine import Machine
from .api import Handler, Request
from .models import Model, as_models, full_name
from .runner import Processes
from .scheduler import Scheduler
from .settings import Settings


class OllamaError(RuntimeError):
    """The server answered with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class _Server(ThreadingHTTPServer):
    """One that says nothing of clients that refuse its certificate."""

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a handler raised, but for a failed handshake."""
        if not isinstance(sys.exc_info()[1], ssl.SSLError):
            super().handle_error(request, client_address)


class OllamaServer:
    """Ollama on loopback; a context manager.

    requests: every request so far.
    delays: seconds to wait before answering, by path.
    errors: (status, text) to answer with, by path.
    answers: bodies to answer with in place of the true ones, by path.
    """

    def __init__(
        self,
        machine: Machine | None,
        models: Mapping[str, Any] | list[Model],
        *,
        port: int = 0,
        address: str = "127.0.0.1",
        version: str = "0.33.0",
        settings: Settings | None = None,
        binaries: Path | None = None,
        tls: ssl.SSLContext | None = None,
        **options: Any,
    ) -> None:
        """Start serving.

        machine: None for an Ollama without a GPU, or on another host.
        models: `Model` values, or a mapping of names to sizes or to the fields of `Model`.
        address: to listen on: 127.0.0.1, or ::1.
        binaries: where the compiled helper is kept between runs.
        tls: speak https with this certificate; Ollama itself does not, a proxy before it does.
        options: the fields of `Settings`.
        """
        self.version = version
        self.models = as_models(models)
        self.requests: list[Request] = []
        self.registry: dict[str, Model] = {}
        """What can be pulled, by full name."""
        self.delays: dict[str, float] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.answers: dict[str, bytes] = {}
        handler = type("BoundHandler", (Handler,), {"ollama": self})
        self._is_secure = tls is not None
        self._address = address
        self._http = _Server((address, port), handler)
        if tls is not None:
            # The handshake is left to the thread of each client.
            self._http.socket = tls.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.processes = Processes(version, binaries)
        self.scheduler = Scheduler(machine, self.processes, settings or Settings(**options))
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.02,), name="ollama-http", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> OllamaServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; all models leave VRAM."""
        self._http.shutdown()
        self._http.server_close()
        self.scheduler.close()
        runners = self.runner_pids()
        self.processes.close()
        self.processes.wait_for_death(runners)

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._http.server_address[1])

    @property
    def host(self) -> str:
        """Host and port, as in OLLAMA_HOST."""
        address = f"[{self._address}]" if ":" in self._address else self._address
        return f"{address}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{'https' if self._is_secure else 'http'}://{self.host}"

    def runner_pids(self) -> list[int]:
        """Return the PIDs that hold the models' VRAM."""
        return [entry.pid for entry in self.scheduler.loaded()]

    def wait(self, seconds: float) -> bool:
        """Block until the server is closed, for so long at most; return whether it is."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- through HTTP, as a client would ---

    def request(self, path: str, body: object = None, timeout: float = 60.0) -> Any:
        """Send a request, POST if there is a body; return the decoded answer."""
        # http.client, because urllib reads the CA certificates for each opener: 30 ms.
        connection = self._connection(timeout)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.status >= 400:
            raise OllamaError(answer.status, text)
        return json.loads(text)

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if not self._is_secure:
            return http.client.HTTPConnection(self._address, self.port, timeout=timeout)
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(
            self._address, self.port, timeout=timeout, context=trusting
        )

    def load(self, name: str, *, keep_alive: float | str | None = None, **options: Any) -> Any:
        """Load a model; *options* are request options such as num_ctx. Returns its ps entry."""
        body: dict[str, Any] = {"model": name, "stream": False}
        if keep_alive is not None:
            body["keep_alive"] = keep_alive
        if options:
            body["options"] = options
        self.request("/api/generate", body)
        return next((entry for entry in self.ps() if entry["name"] == full_name(name)), None)

    def unload(self, name: str) -> None:
        """Unload a model."""
        self.request("/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    def ps(self) -> list[dict[str, Any]]:
        """Return the entries of /api/ps."""
        entries: list[dict[str, Any]] = self.request("/api/ps")["models"]
        return entries

    def spilled(self) -> list[str]:
        """Return the models that are not wholly on GPUs; asks the scheduler, not HTTP."""
        loaded = self.scheduler.loaded()
        return [entry.model.full_name for entry in loaded if entry.placement.vram < entry.need]
