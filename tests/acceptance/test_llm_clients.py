"""The fixture `ollama` with clients that people use, and the words of the server on wrong calls."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.ollama import Model, OllamaServer

from .conftest import Project

CLIENTS = {
    "ollama": """
    import pytest
    ollama_package = pytest.importorskip("ollama")

    @pytest.fixture
    def client(ollama):
        return ollama_package.Client(host=ollama.base_url)

    def test_generate(ollama, client):
        answer = client.generate(model=ollama.model, prompt="a", options=ollama.options)
        assert ollama.record(answer).response == "Simulated answer."

    @pytest.mark.parametrize("call, status, words", [
        (lambda client, model: client.embed(model=model, input="a"), 501, "embeddings"),
        (lambda client, model: client.chat(
            model=model,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        ), 400, "does not support tools"),
        (lambda client, model: client.generate(model="other:1b", prompt="a"), 404, "not found"),
    ])
    def test_words_of_the_server(ollama, client, call, status, words):
        with pytest.raises(ollama_package.ResponseError, match=words) as caught:
            call(client, ollama.model)
        assert caught.value.status_code == status
    """,
    "openai": """
    import pytest
    openai = pytest.importorskip("openai")

    def test_chat(ollama):
        client = openai.OpenAI(base_url=ollama.openai_base_url, api_key="none")
        messages = [{"role": "user", "content": "a"}]
        answer = client.chat.completions.create(model=ollama.model, messages=messages)
        assert ollama.record(answer).choices[0].message.content == "Simulated answer."

    def test_unknown_model(ollama):
        client = openai.OpenAI(base_url=ollama.openai_base_url, api_key="none", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="model 'other:1b' not found"):
            client.chat.completions.create(model="other:1b", messages=[])
    """,
    "httpx": """
    import httpx

    def test_generate(ollama):
        body = {"model": ollama.model, "prompt": "a", "stream": False}
        url = f"{ollama.base_url}/api/generate"
        answer = httpx.post(url, json={**body, "options": ollama.options}, timeout=60)
        assert ollama.record(answer).json()["response"] == "Simulated answer."
    """,
}


@pytest.mark.parametrize(
    ("client", "passed", "tokens"), [("ollama", 4, 3), ("openai", 2, 2), ("httpx", 1, 3)]
)
def test_client(
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
    client: str,
    passed: int,
    tokens: int,
) -> None:
    """Each finds server and model, its answers are counted, and errors are the server's own."""
    if importlib.util.find_spec(client) is None:
        pytest.skip(f"the package {client} is not installed here")
    machine_with(Device(total="24GB", used="2GB"))
    server: OllamaServer = ollama_with([Model("a:1b", "1GB")])
    project.write(test_project=CLIENTS[client])
    options = ["-o", "gpu_share_ollama_tests=test_project.py = a:1b", "--gpu-share-report=r.json"]
    result = project.pytest("--gpu-share", "-n2", *options)
    assert (result.code, result.passed) == (0, passed), result.out + result.err
    # Nothing that the fixture says has the model loaded again.
    assert server.scheduler.loads == ["a:1b"]
    report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
    (answers,) = report["ollama"]["tests"]["answers"]
    assert answers["tokens"] == tokens
