"""Loading models beside a server that answers the start's questions and then goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from simulator.ollama import Model, OllamaServer

from pytest_gpushare.ollama import preload as module
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.preload import Preloaded, preload
from pytest_gpushare.units import GB


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    models = [Model("m:1b", "1GB"), Model("n:1b", "1GB"), Model("e:1b", "1GB", embeds=True)]
    with OllamaServer(None, models) as server:
        yield server


def facts(server: OllamaServer, *models: LoadedModel, **changes: object) -> OllamaFacts:
    given = {"address": server.host, "asked": True, "answered": True, "models": models}
    return OllamaFacts(**{**given, "server": parse_address(server.host), **changes})  # type: ignore[arg-type]


def load(server: OllamaServer, *names: str, told: OllamaFacts | None = None) -> Preloaded:
    ours: list[LoadedModel] = []
    done = preload(names, told or facts(server), lambda: 3 * GB, lambda _: None, ours)
    assert tuple(ours) == done.ours
    return done


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "it cannot be loaded (status 400)"),
        (403, "the server refuses (status 403)"),
        (404, "the server has no such model: ollama pull it (status 404)"),
        (418, "the server refuses (status 418)"),
        (500, "the server failed to load it (status 500); 3.0 GB of VRAM were free"),
        (503, "the server is busy (status 503); 3.0 GB of VRAM were free"),
    ],
)
def test_refused(status: int, words: str, server: OllamaServer) -> None:
    """What the status means, and where it may be for want of VRAM, how much was free."""
    server.errors = dict.fromkeys(("/api/generate", "/api/embed"), (status, "no"))
    done = load(server, "m:1b", "n:1b")
    assert [tuple(problem) for problem in done.problems] == [("m:1b", words), ("n:1b", words)]
    assert done.ours == ()


def test_too_slow(server: OllamaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that takes longer than the limit is given up; hanging up ends it."""
    monkeypatch.setattr(module, "LOAD_LIMIT", 0.4)
    server.scheduler.settings = type(server.scheduler.settings)(load_delay=30.0)
    began = time.monotonic()
    done = load(server, "m:1b")
    assert time.monotonic() - began < 5
    assert done.problems[0].text == "it was not loaded within 0.4 s; 3.0 GB of VRAM were free"
    assert server.ps() == []


def test_server_that_stops(server: OllamaServer) -> None:
    told = facts(server)
    server.close()
    done = load(server, "m:1b", told=told)
    assert done.problems[0].text.startswith("nothing listens there any more")


def test_one_after_another(server: OllamaServer) -> None:
    """Each once, by whatever name; what is there, and what runs elsewhere, not at all."""
    there = LoadedModel("n:1b", GB, GB)
    cloud = ModelFacts("big-cloud", is_remote=True)
    told = facts(server, there, relied_on=(cloud,))
    done = load(server, "m:1b", "M:1B", "library/m:1b", "n:1b", "big-cloud", "e:1b", told=told)
    assert [model.name for model in done.ours] == ["m:1b", "e:1b"]
    sent = [(r.path, r.json()["model"]) for r in server.requests if r.method == "POST"]
    assert sent == [
        ("/api/generate", "m:1b"),
        ("/api/generate", "e:1b"),
        ("/api/embed", "e:1b"),
    ]


def test_no_answer_at_the_start(server: OllamaServer) -> None:
    """Nothing is sent to a server of which nothing is known."""
    told = facts(server, answered=False, problem="no answer within 0.5 s")
    done = load(server, "m:1b", told=told)
    assert (
        done.problems[0].text == f"Ollama at {server.host} cannot load it: no answer within 0.5 s"
    )
    assert server.requests == []
