"""Loads and pulls that a server refuses, or answers with nonsense: the reason has its words."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from simulator.ollama import Model, OllamaServer

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.models import RunModel
from pytest_gpushare.session.llm_loads import Loader, ModelLoadError
from pytest_gpushare.units import GB


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(None, {"a:1b": "1GB"}) as found:
        yield found


def loader(server: OllamaServer, *, is_over: bool = False) -> Loader:
    return Loader(parse_address(server.host), lambda: None, lambda: is_over)


def wanted(name: str) -> RunModel:
    return RunModel(name, names=(name,))


def test_a_pull_shows_its_progress(server: OllamaServer) -> None:
    server.registry["b:1b"] = Model("b:1b", GB)
    found: list[tuple[str, int | None]] = []
    loader(server).pull("b:1b", 30, lambda words, share: found.append((words, share)))
    assert found[0] == ("pulling manifest", None)
    assert [share for _, share in found if share is not None] == [25, 50, 75, 100]
    assert "b:1b" in server.models


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b'{"error": "no space left on device"}', "no space left on device"),
        (None, "pull model manifest: file does not exist"),
    ],
)
def test_a_pull_that_fails_has_the_servers_words(
    server: OllamaServer, answer: bytes | None, reason: str
) -> None:
    if answer is not None:
        server.answers["/api/pull"] = answer + b"\n"
    with pytest.raises(ModelLoadError) as caught:
        loader(server).pull("b:1b", 30, lambda _words, _share: None)
    assert str(caught.value) == f"it cannot be pulled: {reason}"


def test_lines_of_a_pull_that_make_no_sense_say_nothing(server: OllamaServer) -> None:
    lines = [b"{", b"[1]", b"[" * 10_000, json.dumps({"status": 3, "total": "x"}).encode(),
             json.dumps({"status": "pulling", "total": 4, "completed": 5}).encode()]  # fmt: skip
    server.answers["/api/pull"] = b"".join(line + b"\n" for line in lines)
    found: list[tuple[str, int | None]] = []
    loader(server).pull("b:1b", 30, lambda words, share: found.append((words, share)))
    assert found == [("", None)] * 4 + [("pulling", None)]


def test_an_end_of_the_run_ends_a_load_and_a_pull(server: OllamaServer) -> None:
    for path in ("/api/generate", "/api/pull"):
        # The server goes on alone, and must not start what the end of the test has ended.
        server.delays[path], server.answers[path] = 3, b"{}"
    ended = loader(server, is_over=True)
    with pytest.raises(ModelLoadError, match="^no answer within 30 s$"):
        ended.load(wanted("a:1b"), 30)
    with pytest.raises(ModelLoadError, match="^it cannot be pulled: no answer within 30 s$"):
        ended.pull("b:1b", 30, lambda _words, _share: None)


def test_a_load_that_is_refused_has_the_servers_words(server: OllamaServer) -> None:
    server.errors["/api/generate"] = 500, "no memory"
    with pytest.raises(ModelLoadError, match="no memory"):
        loader(server).load(wanted("a:1b"), 30)


def test_a_server_that_is_gone_loads_nothing() -> None:
    with OllamaServer(None, {}) as server:
        gone = loader(server)
    with pytest.raises(ModelLoadError):
        gone.load(wanted("a:1b"), 5)
