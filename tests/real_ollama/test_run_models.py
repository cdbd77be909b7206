"""Tests that use models, beside a real server: loaded once each, kept, limited, given back.

Nothing depends on what the models say: they are made of random numbers, or of zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulator import Device, Machine

from ..acceptance.conftest import Project
from .conftest import Start
from .server import RealOllama
from .test_answers import keeps

pytestmark = pytest.mark.timeout(600)

SUITE = """
    import json, time, urllib.request
    import pytest

    def post(url, body):
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def generate(ollama):
        body = {"model": ollama.model, "prompt": "a", "stream": False}
        options = {**ollama.options, "num_predict": 4}
        answer = post(f"{ollama.base_url}/api/generate", {**body, "options": options})
        assert answer["done"]
        ollama.record(answer)

    def chat(ollama):
        body = {"model": ollama.model, "messages": [{"role": "user", "content": "a"}]}
        options = {**ollama.options, "num_predict": 4}
        body = {**body, "options": options, "stream": False}
        assert post(f"{ollama.base_url}/api/chat", body)["done"]

    def openai(ollama):
        body = {"model": ollama.model, "messages": [{"role": "user", "content": "a"}]}
        answer = post(f"{ollama.openai_base_url}/chat/completions", {**body, "max_tokens": 4})
        assert answer["choices"]
        ollama.record(answer)

    CLIENTS = [generate, chat, openai]

    @pytest.mark.parametrize("i", range(2))
    @pytest.mark.parametrize("client", CLIENTS)
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("tiny", marks=pytest.mark.ollama(model="tiny")),
            pytest.param("tiny-b", marks=pytest.mark.ollama(model="tiny-b")),
        ],
    )
    def test_answer(ollama, name, client, i):
        assert ollama.model == name
        client(ollama)
"""


@pytest.fixture
def server(start: Start) -> RealOllama:
    """One model at a time, and one request."""
    return start(OLLAMA_MAX_LOADED_MODELS="1", OLLAMA_NUM_PARALLEL="1")


def test_four_workers_three_clients_two_models(project: Project, server: RealOllama) -> None:
    """As many loads as models, no request fails, no time-out."""
    project.write(test_project=SUITE)
    result = project.pytest("--gpu-share", "-n4")
    assert (result.code, result.passed) == (0, 12), result.out
    assert "gpu-share: 12 tests used 2 Ollama models: 2 loads" in result.out
    assert "gave" in result.out
    assert server.loads() == 2
    asked = [r for r in server.requests() if r.method == "POST"]
    assert all(request.status == 200 for request in asked), asked
    # The last one is given back with the server's own keep-alive.
    (entry,) = server.ps()
    assert 0 < keeps(server, entry["name"].removesuffix(":latest")) <= 300


def test_context_of_a_group(project: Project, server: RealOllama) -> None:
    """The load has the options of the tests' requests: nothing is loaded a second time."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.ollama(model="tiny", context=512)
    def test_context(ollama, i):
        generate(ollama)
        entry = post(f"{ollama.base_url}/api/show", {"model": "tiny"})
        assert entry
    """
    )
    result = project.pytest("--gpu-share", "-n2", "-k", "test_context")
    assert (result.code, result.passed) == (0, 3), result.out
    assert server.entry("tiny")["context_length"] == 512
    assert "3 tests used 1 Ollama model: 1 load" in result.out
    assert server.loads() == 1


def test_missing_model(project: Project, server: RealOllama) -> None:
    """Its tests are skipped with the reason."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.ollama(model="not-there:1b")
    def test_missing(ollama):
        generate(ollama)
    """
    )
    result = project.pytest("--gpu-share", "-n2", "-k", "test_missing")
    assert result.code == 0, result.out
    assert f"gpu-share: 1 test skipped: no model not-there:1b at {server.host}" in result.out


def test_model_loaded_before_is_left_alone(project: Project, server: RealOllama) -> None:
    """No request for it but those of its tests, and it stays as long as it was to stay."""
    server.load("tiny", keep_alive="20m")
    project.write(test_project=SUITE)
    result = project.pytest("--gpu-share", "-n2", "-k", "tiny- and not tiny-b and generate")
    assert result.code == 0, result.out
    assert "loads" not in result.out.partition("Ollama models")[2].partition("\n")[0]


BESIDE_GPU_TESTS = """
    import gpusim, json, time, urllib.request
    import pytest

    def load(ollama):
        body = {"model": ollama.model, "options": ollama.options, "stream": False}
        url = f"{ollama.base_url}/api/generate"
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=200) as answer:
            assert json.loads(answer.read())["done"]
        with urllib.request.urlopen(f"{ollama.base_url}/api/ps", timeout=60) as answer:
            (entry,) = json.loads(answer.read())["models"]
        assert entry["name"] == f"{ollama.model}:latest"
        assert entry["size_vram"] == entry["size"]

    @pytest.mark.parametrize("i", range(3))
    def test_kv(ollama, i):
        load(ollama)
        time.sleep(0.5)

    @pytest.mark.gpu(vram="@DECLAREDMB")
    @pytest.mark.parametrize("i", range(6))
    def test_gpu(i):
        with gpusim.alloc("@SIZEMB"):
            time.sleep(1)

    @pytest.mark.parametrize("i", range(3))
    def test_l1(ollama, i):
        load(ollama)
        time.sleep(0.5)
"""

RULES = """\
[pytest]
gpu_share_ollama_timeout_s = 20
gpu_share_ollama_models = kv l1
gpu_share_ollama_context = 16384
gpu_share_ollama_vram_reservation_mb = auto
gpu_share_ollama_phase = @PHASE
gpu_share_safety_buffer_mb = 256
gpu_share_preset = packed
gpu_share_ollama_tests =
    *test_kv* = kv
    *test_l1* = l1
"""


@pytest.mark.parametrize(
    ("phase", "size"), [("beside", 1000), ("before", 5600), ("after", 5600), ("auto", 5600)]
)
def test_gpu_tests_and_models(
    phase: str,
    size: int,
    project: Project,
    start: Start,
    machine_with: Callable[..., Machine],
) -> None:
    """Next to each other where they fit, else in phases: two loads, each wholly on the GPU."""
    machine = machine_with(Device(total="8GB", used="0.5GB"), context="400MB")
    server = start(
        machine,
        OLLAMA_MAX_LOADED_MODELS="1",
        OLLAMA_NUM_PARALLEL="1",
        OLLAMA_CONTEXT_LENGTH="16384",
    )
    project.file("pytest.ini", RULES.replace("@PHASE", phase))
    text = BESIDE_GPU_TESTS.replace("@SIZE", str(size)).replace("@DECLARED", str(size + 400))
    project.write(test_project=text)
    result = project.pytest("--gpu-share", "-n4", "-vv")
    print(result.out)
    assert (result.code, result.passed) == (0, 12), result.out
    assert server.loads() == 2
    placed = [layers.split("/") for layers in server.layers()]
    assert len(placed) == 2
    assert all(on_gpu == of for on_gpu, of in placed), placed
    assert all(r.status == 200 for r in server.requests() if r.method == "POST")
    assert machine.snapshot()[0].peak_used <= 8 << 30
