"""Suites that talk to Ollama as they are found today, served by lines of the ini file alone.

Each imitates the habits of a public suite: how it finds the server, gates its tests, warms a model
up, marks and distributes. No test is edited; with the lines each model is loaded once, no more
tests use it at once than it answers, and without a server all are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.ollama import Model, OllamaServer

from .conftest import Project

ASK = """
    import json, os, urllib.request
    import pytest

    def call(path, body=None):
        url = "http://" + os.environ["OLLAMA_HOST"] + path
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            return json.loads(answer.read())

    def ask(model, **more):
        body = {"model": model, "prompt": "take 0.02 s", "stream": False, **more}
        return call("/api/generate", body)
"""

PIXELTABLE = (
    ASK
    + """
    MODEL = "qwen3:0.6b"

    def skip_without_ollama():
        try:
            tags = call("/api/tags")
        except OSError:
            pytest.skip("Ollama is not running")
        if MODEL not in [model["name"] for model in tags["models"]]:
            pytest.skip("no model")

    @pytest.mark.xdist_group("ollama")
    class TestOllama:
        def test_generate(self):
            skip_without_ollama()
            assert ask(MODEL)["response"]

        def test_again(self):
            skip_without_ollama()
            assert ask(MODEL)["response"]

    def test_table():
        assert sorted([2, 1]) == [1, 2]
"""
)

HAYSTACK = (
    ASK
    + """
    @pytest.mark.integration
    @pytest.mark.parametrize("prompt", ["a", "b", "c"])
    def test_generator(prompt):
        assert ask("qwen3:0.6b")["done"]

    @pytest.mark.integration
    def test_vision():
        assert ask("moondream:1.8b")["done"]

    @pytest.mark.integration
    def test_generator_again():
        assert ask("qwen3:0.6b")["done"]

    def test_component():
        pass
"""
)

AGENT_FRAMEWORK = (
    ASK
    + """
    skip_if_disabled = pytest.mark.skipif(
        os.getenv("OLLAMA_MODEL", "") in ("", "test-model"), reason="no real model is given"
    )
    CHAT, EMBED = os.getenv("OLLAMA_MODEL", ""), "nomic-embed-text"

    @pytest.mark.flaky
    @skip_if_disabled
    @pytest.mark.parametrize("i", range(3))
    def test_chat_client(i):
        assert ask(CHAT)["done"]

    @skip_if_disabled
    @pytest.mark.parametrize("i", range(3))
    def test_embedding(i):
        assert call("/api/embed", {"model": EMBED, "input": "text"})["embeddings"]
"""
)

MELLEA = (
    ASK
    + """
    @pytest.fixture(scope="module")
    def session():
        ask("granite4.1:3b", prompt="", keep_alive=-1)
        yield "granite4.1:3b"
        ask("granite4.1:3b", prompt="", keep_alive=0)

    @pytest.mark.ollama
    @pytest.mark.llm
    @pytest.mark.parametrize("i", range(3))
    def test_instruct(session, i):
        assert ask(session)["done"]

    @pytest.mark.ollama
    def test_vision():
        assert ask("granite3.2-vision")["done"]

    def test_no_backend():
        pass
"""
)

SUITES = {
    "pixeltable": (
        PIXELTABLE,
        "gpu_share_ollama_tests = test_project.py::TestOllama = qwen3:0.6b",
        ["-n3", "--dist=loadgroup"],
        ["qwen3:0.6b"],
        (3, 2),
    ),
    "haystack": (
        HAYSTACK,
        """markers = integration
        gpu_share_markers = integration = ollama
        gpu_share_ollama_models = qwen3:0.6b
        gpu_share_ollama_tests = test_project.py::test_vision = moondream:1.8b""",
        ["-n2"],
        ["moondream:1.8b", "qwen3:0.6b"],
        (6, 5),
    ),
    "agent-framework": (
        AGENT_FRAMEWORK,
        """markers = flaky
        gpu_share_ollama_tests =
            test_project.py::test_chat_client = qwen2.5:1.5b
            test_project.py::test_embedding = nomic-embed-text""",
        ["-n3", "--dist=worksteal"],
        ["nomic-embed-text:latest", "qwen2.5:1.5b"],
        (6, 6),
    ),
    "mellea": (
        MELLEA,
        """markers = llm
        gpu_share_ollama_tests =
            test_project.py::test_instruct = granite4.1:3b
            test_project.py::test_vision = granite3.2-vision""",
        ["-n2"],
        ["granite3.2-vision:latest", "granite4.1:3b"],
        (5, 4),
    ),
}


@pytest.fixture
def server(machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]) -> OllamaServer:
    """24 GB, 22 GB free, and an Ollama that holds one model at a time."""
    machine_with(Device(total="24GB", used="2GB"))
    names = ["qwen3:0.6b", "moondream:1.8b", "qwen2.5:1.5b", "granite4.1:3b", "granite3.2-vision"]
    models = [Model(name, "1GB") for name in names]
    return ollama_with([*models, Model("nomic-embed-text", "1GB", embeds=True)], max_loaded=1)


@pytest.mark.parametrize("name", SUITES)
def test_suite(name: str, project: Project, server: OllamaServer) -> None:
    """As many loads as models, one test at a time on each; without a server they are skipped."""
    suite, lines, arguments, models, (passed, skipped) = SUITES[name]
    project.write(test_project=suite)
    project.file("pytest.ini", f"        [pytest]\n        gpu_share = true\n        {lines}\n")
    project.environment["OLLAMA_MODEL"] = "qwen2.5:1.5b"
    result = project.pytest(*arguments)
    assert (result.code, result.passed) == (0, passed), result.out + result.err
    assert sorted(server.scheduler.loads) == models
    assert all(most == 1 for most in server.scheduler.most_at_once.values())
    assert f"used {len(models)} Ollama model" in result.out
    result = project.pytest(*arguments, OLLAMA_HOST="127.0.0.1:9")
    assert result.code in (0, 5), result.out
    assert f"gpu-share: {skipped} tests skipped: no Ollama at 127.0.0.1:9" in result.out
