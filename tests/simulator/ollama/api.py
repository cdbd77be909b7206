"""Ollama's HTTP API on top of the scheduler."""

from __future__ import annotations

import ipaddress
import json
import re
import select
import socket
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..sizes import to_bytes
from .durations import moment, seconds
from .models import full_name
from .runner import as_tuple
from .scheduler import NUMBERS, BusyError, LoadAbortedError, LoadError

if TYPE_CHECKING:
    from .scheduler import Loaded
    from .server import OllamaServer


_GETS = ("/", "/api/version", "/api/ps", "/api/tags")
_POSTS = (
    "/api/show",
    "/api/generate",
    "/api/chat",
    "/api/embed",
    "/api/pull",
    "/v1/chat/completions",
)


@dataclass(frozen=True)
class Request:
    """One request as it came in; `time` is time.time()."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    time: float

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.body)


class ApiError(Exception):
    """An answer ``{"error": text}`` with a status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # Header and body are written separately: with Nagle's algorithm the body would wait
    # for the client's delayed acknowledgement, 40 ms.
    disable_nagle_algorithm = True
    server_version, sys_version = "", ""
    ollama: OllamaServer  # set by the server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: requests are recorded."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(b"")

    def do_HEAD(self) -> None:
        """Answer a HEAD."""
        self._answer(b"")

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.ollama.requests.append(Request(self.command, path, headers, body, time.time()))
        time.sleep(self.ollama.delays.get(path, 0.0))
        try:
            if not self._host_is_local():
                self._send(403, b"", "text/plain")
                return
            if path in self.ollama.errors:
                raise ApiError(*self.ollama.errors[path])
            if path in self.ollama.answers:
                self._send(200, self.ollama.answers[path], "application/json; charset=utf-8")
                return
            self._route(path, body)
        except ApiError as error:
            self._send_json({"error": str(error)}, error.status)
        except LoadAbortedError:
            self.close_connection = True
        except BusyError as error:
            self._send_json({"error": str(error)}, 503)
        except LoadError as error:
            self._send_json({"error": str(error)}, 500)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str, body: bytes) -> None:
        get, post = self.command == "GET", self.command == "POST"
        if path == "/" and (get or self.command == "HEAD"):
            self._send(200, b"Ollama is running", "text/plain; charset=utf-8")
        elif path == "/api/version" and get:
            self._send_json({"version": self.ollama.version})
        elif path == "/api/ps" and get:
            entries = self.ollama.scheduler.loaded()
            self._send_json({"models": [self._ps_entry(entry) for entry in entries]})
        elif path == "/api/tags" and get:
            self._send_json({"models": [m.tag() for m in self.ollama.models.values()]})
        elif path == "/api/show" and post:
            request = _object(body)
            name = request.get("model") or request.get("name")
            if not name:
                raise ApiError(400, "model is required")
            model = self._model(name, shown=full_name(str(name)))
            self._send_json(model.show(verbose=bool(request.get("verbose"))))
        elif path == "/api/generate" and post:
            self._generate(_object(body))
        elif path == "/api/chat" and post:
            self._generate(_object(body), chat=True)
        elif path == "/v1/chat/completions" and post:
            self._complete(_object(body))
        elif path == "/api/embed" and post:
            self._embed(_object(body))
        elif path == "/api/pull" and post:
            self._pull(_object(body))
        elif path in (*_GETS, *_POSTS):
            self._send(405, b"405 method not allowed", "text/plain")
        else:
            self._send(404, b"404 page not found", "text/plain")

    def _ps_entry(self, entry: Loaded) -> dict[str, Any]:
        model = entry.model
        shown = {
            "name": model.full_name,
            "model": model.full_name,
            "size": entry.size,
            "digest": model.digest,
            "details": model.details(),
            "expires_at": entry.expires_at,
            "size_vram": entry.placement.vram or to_bytes(self.ollama.scheduler.settings.cpu_bytes),
            "context_length": entry.key[0],
        }
        if (0, 0, 0) < as_tuple(self.ollama.version) < (0, 10, 0):
            del shown["context_length"]
        return shown

    def _complete(self, request: dict[str, Any]) -> None:
        """OpenAI's path: `options` in the body are ignored, so that no context can be set."""
        model = self.ollama.models.get(full_name(str(request.get("model"))))
        if model is None:
            text = f"model '{request.get('model')}' not found"
            error = {"message": text, "type": "not_found_error", "param": None, "code": None}
            self._send_json({"error": error}, 404)
            return
        scheduler = self.ollama.scheduler
        entry = scheduler.acquire(model, aborted=self._client_is_gone)
        time.sleep(scheduler.settings.generate_delay)
        scheduler.release(entry)
        message = {"role": "assistant", "content": "Simulated answer."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send_json(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": request["model"],
                "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            }
        )

    def _generate(self, request: dict[str, Any], *, chat: bool = False) -> None:
        began = time.monotonic_ns()
        model = self._model(request.get("model"))
        if model.embeds:
            raise ApiError(400, f'"{model.full_name}" does not support generate')
        if request.get("tools"):
            raise ApiError(400, f"{model.full_name} does not support tools")
        prompt = request.get("messages" if chat else "prompt") or ""
        options = {**(request.get("options") or {}), "shift": request.get("shift")}
        for key in ("num_ctx", *NUMBERS):
            if type(options.get(key, 0)) is not int:
                raise ApiError(500, f'option "{key}" must be of type integer')
        try:
            given = request.get("keep_alive")
            keep_alive = None if given is None else seconds(given)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        scheduler = self.ollama.scheduler
        if keep_alive == 0 and not prompt:
            scheduler.unload(model)
            self._send_generated(request, model.full_name, [], "unload", began)
            return
        entry = scheduler.acquire(
            model,
            options=options,
            keep_alive=keep_alive,
            aborted=self._client_is_gone,
        )
        try:
            if prompt:
                with entry.places:
                    time.sleep(_seconds_for(prompt, scheduler.settings.generate_delay))
        finally:
            # Before the answer: who has it finds the keep-alive of this request in ps.
            scheduler.release(entry)
        words = ["Simulated", " answer", "."] if prompt else []
        self._send_generated(request, model.full_name, words, "stop" if prompt else "load", began)

    def _embed(self, request: dict[str, Any]) -> None:
        name = request.get("model")
        model = self.ollama.models.get(full_name(str(name)))
        if model is None:
            raise ApiError(404, f'model "{name}" not found, try pulling it first')
        if not model.embeds:
            text = "This server does not support embeddings. Start it with `--embeddings`"
            raise ApiError(501, text)
        given = request.get("keep_alive")
        keep_alive = None if given is None else seconds(given)
        scheduler = self.ollama.scheduler
        entry = scheduler.acquire(model, keep_alive=keep_alive, aborted=self._client_is_gone)
        scheduler.release(entry)
        vectors = [[0.0]] if request.get("input") else []
        self._send_json({"model": request["model"], "embeddings": vectors})

    def _pull(self, request: dict[str, Any]) -> None:
        """Progress as lines; a model that the registry does not have is an error among them."""
        name = full_name(str(request.get("model") or request.get("name")))
        found = self.ollama.registry.get(name)
        lines: list[dict[str, Any]] = [{"status": "pulling manifest"}]
        if found is None:
            lines.append({"error": "pull model manifest: file does not exist"})
        else:
            size = found.file_bytes
            layer = {"status": "pulling 2af3b81862c6", "digest": "sha256:2af3b81862c6"}
            lines += [
                {**layer, "total": size, "completed": size * part // 4} for part in range(1, 5)
            ]
            lines.append({"status": "success"})
        time.sleep(self.ollama.scheduler.settings.pull_delay)
        if found is not None:
            self.ollama.models[name] = found
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self._send(200, text, "application/x-ndjson")

    def _send_generated(
        self, request: dict[str, Any], name: str, words: list[str], reason: str, began: int
    ) -> None:
        head = {"model": request.get("model", name), "created_at": moment(time.time_ns())}
        last = {**head, "response": "", "done": True, "done_reason": reason}
        if words:
            took = time.monotonic_ns() - began
            last |= {"total_duration": took, "eval_count": len(words), "eval_duration": took}
        if request.get("stream") is False:
            self._send_json({**last, "response": "".join(words)})
            return
        parts = [{**head, "response": word, "done": False} for word in words]
        lines = b"".join(json.dumps(part).encode() + b"\n" for part in [*parts, last])
        self._send(200, lines, "application/x-ndjson")

    def _model(self, name: Any, shown: str = "") -> Any:
        name = "" if name is None else str(name)
        model = self.ollama.models.get(full_name(name)) if name else None
        if model is None:
            raise ApiError(404, f"model '{shown or name}' not found")
        return model

    def _host_is_local(self) -> bool:
        """The Host check: addresses, this host's name and names that lead nowhere else; names
        of /etc/hosts are foreign to it. A foreign Origin is refused alike."""
        origin = self.headers.get("Origin", "")
        names = [self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]").lower()]
        if origin:
            names.append(urlsplit(origin).hostname or origin)
        return all(_is_local(name) for name in names)

    def _client_is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _seconds_for(prompt: Any, usual: float) -> float:
    """How long an answer takes: `take 0.25 s` is a prompt that says it itself."""
    match = re.fullmatch(r"take (\d+(?:\.\d+)?) s", prompt) if isinstance(prompt, str) else None
    return float(match[1]) if match else usual


def _is_local(name: str) -> bool:
    if name in ("", "localhost", socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.endswith((".localhost", ".local", ".internal"))
    return True


def _object(body: bytes) -> dict[str, Any]:
    if not body:
        raise ApiError(400, "missing request body")
    try:
        value = json.loads(body)
    except ValueError:
        raise ApiError(400, "unexpected EOF") from None
    if not isinstance(value, dict):
        raise ApiError(400, "json: cannot unmarshal into an object")
    return value
