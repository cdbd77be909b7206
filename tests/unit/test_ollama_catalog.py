"""What Ollama says of models that a run relies on: few questions, none of them believed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator.ollama import FAULTS, FaultyServer, Model, OllamaServer

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.catalog import ask_models
from pytest_gpushare.ollama.models import ModelFacts
from pytest_gpushare.ollama.prediction import Server, predict
from pytest_gpushare.units import GB

WINDOWED = Model(
    "gemma3:12b",
    size="10GB",
    architecture="gemma3",
    layers=6,
    kv_heads=(8, 8, 8, 8, 8, 4),
    key_length=256,
    value_length=256,
    window=1024,
    windowed=(True, True, True, True, True, False),
    trained_context=131072,
)
MODELS = [
    Model("qwen2.5:14b", size="10.8GB"),
    Model("tuned", size="10.8GB", num_ctx=8192),
    Model("glm-5:cloud", size="10.8GB", remote="https://ollama.com:443"),
    WINDOWED,
]


@pytest.fixture(scope="module")
def server() -> Iterator[OllamaServer]:
    with OllamaServer(None, MODELS) as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(server: OllamaServer) -> None:
    server.requests.clear()
    server.errors.clear()
    server.answers.clear()
    server.delays.clear()


def ask(host: str, *names: str, limit: float = 5) -> tuple[ModelFacts, ...]:
    return ask_models(parse_address(host), names, time.monotonic() + limit, lambda _: None)


def asked(server: OllamaServer) -> list[tuple[str, str, Any]]:
    return [(r.method, r.path, r.json() if r.body else None) for r in server.requests]


def test_a_plain_model(server: OllamaServer) -> None:
    """One question for all and one for it; the lists of its tokens stay where they are."""
    (found,) = ask(server.host, "qwen2.5:14b")
    model = server.models["qwen2.5:14b"]
    assert (found.file_bytes, found.digest) == (model.file_bytes, model.digest)
    assert predict(found, Server(0, "0.33.0", 4096)).kv_cache == model.kv_bytes(4096)
    assert asked(server) == [
        ("GET", "/api/tags", None),
        ("POST", "/api/show", {"model": "qwen2.5:14b"}),
    ]


def test_lists_are_asked_for_only_where_they_decide(server: OllamaServer) -> None:
    """`verbose` for a model whose figures differ by layer; exact with windows and all."""
    (found,) = ask(server.host, "gemma3:12b")
    assert asked(server)[1:] == [
        ("POST", "/api/show", {"model": "gemma3:12b"}),
        ("POST", "/api/show", {"model": "gemma3:12b", "verbose": True}),
    ]
    assert found.info is not None
    assert found.info["tokenizer.ggml.tokens"] == 152064
    for context in (4096, 16384):
        found_bytes = predict(found, Server(0, "0.29.0", context)).kv_cache
        assert found_bytes == WINDOWED.kv_bytes(context)


def test_context_of_its_own_and_cloud(server: OllamaServer) -> None:
    tuned, cloud = ask(server.host, "tuned", "glm-5:cloud")
    assert (tuned.num_ctx, cloud.is_remote) == (8192, True)
    assert predict(tuned, Server(24 * GB)).context == 8192


def test_not_there(server: OllamaServer) -> None:
    """What to type is said; nothing more is asked of it."""
    (found,) = ask(server.host, "llama9:7b")
    assert found.problem == "the server does not have it: ollama pull llama9:7b"
    assert len(server.requests) == 1


def test_nothing_of_the_users_is_sent(
    server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proxy, no credentials, no more headers than it takes."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    ask(f"http://me:secret@{server.host}", "qwen2.5:14b")
    assert len(server.requests) == 2
    for request in server.requests:
        assert "secret" not in str(request)
        assert set(request.headers) <= {
            "host", "accept", "accept-encoding", "user-agent", "content-type", "content-length",
        }  # fmt: skip


def test_number_of_requests_is_bounded(server: OllamaServer) -> None:
    """One, and two for each model, whatever the answers."""
    ask(server.host, *["gemma3:12b", "qwen2.5:14b", "tuned", "glm-5:cloud", "nobody"] * 3)
    assert len(server.requests) <= 1 + 2 * 15


@pytest.mark.parametrize(
    ("path", "answer", "problem"),
    [
        ("/api/tags", b"[]", "/api/tags gives no object"),
        ("/api/tags", b'{"models": 3}', "/api/tags gives no list of models"),
        ("/api/tags", b'{"models": [3, {"name": 4}]}', "the server does not have it"),
        ("/api/show", b"{", "/api/show gives no JSON"),
        ("/api/show", b'{"model_info": {}}', "/api/show gives no metadata"),
        ("/api/show", b'{"model_info": []}', "/api/show gives no metadata"),
        ("/api/show", b"[" * 100_000, "/api/show gives no JSON"),
        ("/api/show", b"9" * 5000, "/api/show gives no"),
    ],
)
def test_nonsense(server: OllamaServer, path: str, answer: bytes, problem: str) -> None:
    server.answers[path] = answer
    (found,) = ask(server.host, "qwen2.5:14b")
    assert found.problem.startswith(problem)
    assert found.info is None


@pytest.mark.parametrize("status", [400, 403, 404, 500, 503])
def test_status(server: OllamaServer, status: int) -> None:
    """One model that fails takes none of the others with it."""
    server.errors["/api/show"] = (status, "no")
    first, second = ask(server.host, "qwen2.5:14b", "glm-5:cloud")
    assert first.problem == f"/api/show gives status {status}"
    assert first.file_bytes
    assert second.is_remote


@pytest.mark.parametrize("path", ["/api/tags", "/api/show"])
def test_too_slow(server: OllamaServer, path: str) -> None:
    """What was found in time is kept, and it takes no longer than the limit."""
    server.delays[path] = 3
    began = time.monotonic()
    found = ask(server.host, "qwen2.5:14b", "tuned", limit=0.3)
    assert time.monotonic() - began < 1.5
    assert {each.problem for each in found} == {
        "no answer in time: raise gpu_share_ollama_timeout_s"
    }


@pytest.mark.parametrize("mode", FAULTS)
def test_faulty_servers(mode: str) -> None:
    """Every bad way: a reason, in time."""
    with FaultyServer(mode) as faulty:
        began = time.monotonic()
        (found,) = ask(faulty.host, "m", limit=0.3)
        assert time.monotonic() - began < 2
    assert found.problem.isprintable()
    assert found.problem
    assert found.info is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.fixed_dictionaries({"name": st.just("m:7b") | JSON, "size": JSON, "digest": JSON,
                           "details": JSON, "remote_host": st.none() | JSON}),
    st.fixed_dictionaries({"model_info": JSON | st.dictionaries(
        st.sampled_from(["general.architecture", "llama.block_count"]), JSON | st.just("llama")),
        "parameters": JSON}),
)  # fmt: skip
def test_any_answer(server: OllamaServer, tag: object, shown: object) -> None:
    """Whatever comes back, there are facts that the plan can take."""
    server.answers["/api/tags"] = json.dumps({"models": [tag]}).encode()
    server.answers["/api/show"] = json.dumps(shown).encode()
    (found,) = ask(server.host, "m:7b")
    assert found.name == "m:7b"
    assert found.problem.isprintable()
    assert found.file_bytes is None or 0 < found.file_bytes < 2**50
