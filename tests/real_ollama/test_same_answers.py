"""The simulated server answers odd requests as the real one does."""

from __future__ import annotations

import contextlib
import http.client
import json

import pytest
from simulator.ollama import Model, OllamaServer

from .conftest import Start

BAD = "{"
HOSTS = ["gpu-box", "ollama", "example.com", "localhost", "a.localhost", "x.local", "x.internal",
         "10.1.2.3", "127.0.0.1:99", "[::1]:99"]  # fmt: skip
TALK = [{"role": "user", "content": "a"}]
TINY = {"model": "tiny", "stream": False}
Asked = tuple[str, str, object, dict[str, str]]

REQUESTS: list[Asked] = [
    ("GET", "/", None, {}),
    ("HEAD", "/", None, {}),
    ("HEAD", "/api/ps", None, {}),
    ("GET", "/api/version", None, {}),
    ("GET", "/api/nosuch", None, {}),
    ("GET", "/api/generate", None, {}),
    ("POST", "/api/ps", {}, {}),
    *(("POST", path, body, {}) for path in ("/api/show", "/api/generate", "/api/chat",
      "/api/embed") for body in ({"model": "nosuch"}, BAD, "")),
    ("POST", "/api/show", {}, {}),
    ("POST", "/api/generate", {}, {}),
    ("POST", "/api/generate", {"model": "nosuch", "keep_alive": 0}, {}),
    ("POST", "/api/generate", TINY | {"keep_alive": "soon"}, {}),
    ("POST", "/api/generate", TINY | {"options": {"num_ctx": "many"}}, {}),
    ("POST", "/api/embed", {"model": "tiny", "input": "a"}, {}),
    ("POST", "/v1/chat/completions", {"model": "nosuch", "messages": TALK}, {}),
    *(("GET", "/api/ps", None, {"Host": host}) for host in HOSTS),
    *(("GET", "/api/ps", None, {"Origin": origin}) for origin in
      ("http://example.com", "http://localhost:3000", "null")),
]  # fmt: skip


def ask(port: int, asked: Asked) -> tuple[int, object]:
    """The status, and the body of an error."""
    method, path, body, headers = asked
    sent = None if body is None else body.encode() if isinstance(body, str) else json.dumps(body)
    data = sent.encode() if isinstance(sent, str) else sent
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        text = answer.read().decode()
    if answer.status == 200:
        return 200, ""
    with contextlib.suppress(ValueError):
        return answer.status, json.loads(text)
    return answer.status, text


@pytest.mark.timeout(600)
def test_same_answers(start: Start) -> None:
    """Status and error, for each request."""
    server = start()
    simulated = [Model("tiny", "1GB", trained_context=2048)]
    with OllamaServer(None, simulated, version=server.version) as other:
        differences = [
            (asked, real, ours)
            for asked in REQUESTS
            if (real := ask(server.port, asked)) != (ours := ask(other.port, asked))
        ]
    assert differences == []
