"""Tests that use models of Ollama's: grouped, limited, loaded in time, and skipped without them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.child import child_process, wait_for
from simulator.ollama import Model, OllamaServer

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .test_preload import keeps

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ollama"

SUITE = """
    import json, os, time, urllib.request
    import pytest

    def ask(model, seconds=0.05, **options):
        body = {"model": model, "prompt": f"take {seconds} s", "stream": False}
        if options:
            body["options"] = options
        url = "http://" + os.environ["OLLAMA_HOST"] + "/api/generate"
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())
"""

MARKED = (
    SUITE
    + """
    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.parametrize("model", ["a:1b", "b:1b", "c:1b"])
    def test_placeholder(model, i):
        pass

    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b")

    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.ollama(model="b:1b")
    def test_b(i):
        ask("b:1b")
"""
)


def asked(server: OllamaServer) -> list[str]:
    """The models of the prompts, in the order of the requests."""
    requests = [r.json() for r in server.requests if r.path in ("/api/generate", "/api/chat")]
    return [r["model"] for r in requests if r.get("prompt")]


def turns(server: OllamaServer) -> list[str]:
    """The same, each model once for each turn."""
    return [model for model, _ in groupby(asked(server))]


def most_at_once(server: OllamaServer, name: str) -> int:
    """How many requests at once used a model, at most."""
    return server.scheduler.most_at_once.get(name, 0)


@contextmanager
def running(project: Project, *arguments: str) -> Iterator[subprocess.Popen[Any]]:
    """The project's tests beside the block."""
    command = inner_command("--gpu-share", *arguments)
    with child_process(
        command, cwd=project.path, env=project.environment, stdout=subprocess.DEVNULL
    ) as process:
        yield process


@pytest.fixture
def server(machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]) -> OllamaServer:
    """24 GB, 22 GB free, and an Ollama that holds one model at a time."""
    machine_with(Device(total="24GB", used="2GB"))
    return ollama_with(
        [Model("a:1b", "1GB"), Model("b:1b", "1GB"), Model("c:1b", "1GB")], max_loaded=1
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu-share", "-n2"],
        ["--gpu-share", "-n4", "-o", "gpu_share_cpu_workers=auto"],
        ["--gpu-share", "-n3", "-o", "gpu_share_min_vram_per_worker_gb=20"],
        ["--gpu-share", "-n0"],
    ],
    ids=["GPU workers", "both", "CPU workers", "no workers"],
)
def test_grouped_and_limited(project: Project, server: OllamaServer, arguments: list[str]) -> None:
    """Each model is loaded once, before its first test, and answers one test at a time."""
    project.write(test_project=MARKED)
    result = project.pytest(*arguments)
    assert (result.code, result.passed) == (0, 20), result.out
    assert len(turns(server)) == 2
    assert sorted(server.scheduler.loads) == ["a:1b", "b:1b"]
    assert most_at_once(server, "a:1b") == most_at_once(server, "b:1b") == 1
    assert "gpu-share: 8 tests used 2 Ollama models: 2 loads" in result.out
    assert "no GPU test was selected" not in result.out


@pytest.mark.parametrize("workers", ["-n1", "-n0"])
def test_wait_for_a_model_is_in_the_report(
    project: Project, ollama_with: Callable[..., Any], machine: Machine, workers: str
) -> None:
    """The first test of a model waited for it to be loaded, the others for nothing."""
    ollama_with([Model("a:1b", "1GB"), Model("b:1b", "1GB")], max_loaded=1, load_delay=2.0)
    project.write(test_project=MARKED.replace('"c:1b"', ""))
    report = project.path / "r.json"
    result = project.pytest("--gpu-share", workers, f"--gpu-share-report={report}")
    assert (result.code, result.passed) == (0, 16), result.out
    tests = sorted(read_report(report)["tests"], key=lambda test: test["start_s"])
    waits: dict[str, list[float]] = {"test_a": [], "test_b": [], "test_placeholder": []}
    for test in tests:
        waits[test["nodeid"].partition("::")[2].partition("[")[0]].append(test["waited_s"])
    for first, *others in (waits["test_a"], waits["test_b"]):
        # What the worker did meanwhile is no wait.
        assert 1.0 <= first < 30
        assert max(others) < 0.5
    assert max(waits["test_placeholder"]) < 0.5


def test_simulated_devices(project: Project, server: OllamaServer) -> None:
    """A model that the server lacks is missed as in any run; the others are not loaded."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.ollama(model="a:1b")
    def test_a():
        pass

    @pytest.mark.ollama(model="missing:1b")
    def test_missing():
        pass
    """
    )
    arguments = ("--gpu-share", "-n1", "--gpu-share-simulate=24GB")
    result = project.pytest(*arguments)
    assert (result.code, result.passed) == (0, 1), result.out
    assert "gpu-share: 1 test skipped: no model missing:1b at 127.0.0.1:" in result.out
    assert server.scheduler.loads == []
    result = project.pytest(*arguments, OLLAMA_HOST="127.0.0.1:1")
    assert (result.code, result.passed) == (0, 0), result.out
    assert "gpu-share: 2 tests skipped: no Ollama at 127.0.0.1:1: " in result.out


def test_parallel(project: Project, server: OllamaServer) -> None:
    """As many tests at once as the server answers, and no more."""
    server.scheduler.settings = type(server.scheduler.settings)(parallel=2)
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.parametrize("i", range(8))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b", 0.3)
    """
    )
    result = project.pytest(
        "--gpu-share",
        "-n4",
        "-o",
        "gpu_share_cpu_workers=auto",
        "-o",
        "gpu_share_ollama_parallel=2",
    )
    assert (result.code, result.passed) == (0, 8), result.out
    assert most_at_once(server, "a:1b") == 2


@pytest.mark.parametrize("how", ["skip", "run", "fail", "pull"])
@pytest.mark.parametrize("workers", ["-n1", "-n0"])
def test_missing_model(project: Project, server: OllamaServer, how: str, workers: str) -> None:
    """Skipped, run, failed or pulled; the others run in any case."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.ollama(model="a:1b")
    def test_a():
        ask("a:1b")

    @pytest.mark.ollama(model="new:1b")
    def test_new():
        ask("new:1b")
    """
    )
    if how == "pull":
        server.registry["new:1b"] = Model("new:1b", "1GB")
    result = project.pytest("--gpu-share", workers, "-o", f"gpu_share_without_ollama={how}", "-rs")
    reason = f"no model new:1b at {server.host} (gpu_share_without_ollama = {how})"
    if how == "skip":
        assert (result.code, result.passed) == (0, 1), result.out
        assert reason in re.sub(r"\s+", " ", result.out)
        assert f"gpu-share: 1 test skipped: no model new:1b at {server.host}" in result.out
    elif how == "fail":
        assert (result.code, result.passed) == (1, 1), result.out
        assert reason in result.out
    elif how == "run":
        # The test itself finds out.
        assert (result.code, result.passed) == (1, 1), result.out
        assert "HTTP Error 404" in result.out
    else:
        assert (result.code, result.passed) == (0, 2), result.out
        assert "new:1b" in server.scheduler.loads
    pulls = [r for r in server.requests if r.path == "/api/pull"]
    assert len(pulls) == (how == "pull")


def test_absent_server_is_an_error_under_strict(project: Project, machine: Machine) -> None:
    """Skipped with the reason, counted, and failed under strict."""
    project.write(test_project=MARKED)
    for strict, code in (((), 0), (("--gpu-share-strict",), 1)):
        summary = project.file("summary.md", "")
        environment = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
        result = project.pytest("--gpu-share", "-n1", *strict, **environment)
        assert (result.code, result.passed) == (code, 12), result.out
        assert "gpu-share: 8 tests skipped: no Ollama at 127.0.0.1" in result.out
        assert "8 tests skipped: no Ollama at 127.0.0.1" in summary.read_text(encoding="utf-8")
    assert "(an error under --gpu-share-strict)" in result.out


def test_skips_for_lack_of_a_model_are_not_for_lack_of_a_gpu(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """On CPU workers, where each skip that speaks of a GPU is counted."""
    machine_with(Device(total="4GB", used="3GB"))
    project.write(test_project=MARKED)
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 12), result.out
    assert "gpu-share: 8 tests skipped: no Ollama at 127.0.0.1" in result.out
    assert "for lack of a GPU" not in result.out


def test_rules_aliases_and_parameters(project: Project, server: OllamaServer) -> None:
    """No test is edited: lines of the ini file say which tests use which model."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.requires_ollama("b:1b")
    def test_alias():
        ask("b:1b")

    @pytest.mark.llm
    def test_only():
        ask("c:1b")

    @pytest.mark.parametrize("model", ["a:1b"])
    def test_parameter(model):
        ask(model)

    @pytest.mark.parametrize("i", range(2))
    def test_rule(i):
        ask("b:1b")

    def test_other():
        pass
    """
    )
    project.file(
        "pytest.ini",
        """
        [pytest]
        gpu_share = true
        markers =
            requires_ollama
            llm
        gpu_share_markers =
            requires_ollama(m) = ollama=m
            llm = ollama
        gpu_share_ollama_models = c:1b
        gpu_share_ollama_tests =
            test_project.py::test_rule = b:1b
        gpu_share_ollama_param = model
        """,
    )
    result = project.pytest("-n2")
    assert (result.code, result.passed) == (0, 6), result.out
    assert sorted(server.scheduler.loads) == ["a:1b", "b:1b", "c:1b"]
    assert len(turns(server)) == 3
    assert "gpu-share: 5 tests used 3 Ollama models: 3 loads" in result.out


def test_fixture(project: Project, server: OllamaServer) -> None:
    """Where a test finds its model, and how it should call it."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.ollama(model="a:1b", context=2048)
    def test_native(ollama):
        assert ollama.base_url == "http://" + os.environ["OLLAMA_HOST"]
        assert ollama.openai_base_url == ollama.base_url + "/v1"
        assert (ollama.model, ollama.context) == ("a:1b", 2048)
        assert ollama.options == {"temperature": 0, "seed": 42, "num_ctx": 2048}
        ollama.record(ask(ollama.model, **ollama.options))

    @pytest.mark.ollama(model="b:1b")
    def test_without_context(ollama):
        assert ollama.context is None
        assert ollama.options == {"temperature": 0, "seed": 42}
        ollama.record(ask(ollama.model, **ollama.options))

    def test_unmarked(ollama):
        assert ollama.base_url
    """
    )
    for workers in ("-n2", "-n0"):
        server.scheduler.loads.clear()
        result = project.pytest("--gpu-share", workers, "--gpu-share-report=r.json")
        assert (result.code, result.passed) == (0, 3), result.out
        report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
        tests = report["ollama"]["tests"]
        assert (tests["tests"], tests["not_run"]) == (2, [])
        # The model of the last test is still there when the second run begins.
        assert len(tests["loads"]) == (2 if workers == "-n2" else 1)
        assert {each["model"]: each["tokens"] for each in tests["answers"]} == {
            "a:1b at 2048 tokens": 3,
            "b:1b": 3,
        }
        assert "gpu-share: a:1b at 2048 tokens gave 3 tokens in recorded answers" in result.out
        # The load had the same options as the requests of the test.
        assert server.scheduler.loads.count("a:1b") <= 1


def test_fixture_in_an_idle_run(project: Project, server: OllamaServer) -> None:
    """Without --gpu-share the fixture works, too, and skips a test without its model."""
    project.write(
        test_project="""
    import pytest

    @pytest.mark.ollama(model="a:1b")
    def test_there(ollama):
        assert ollama.model == "a:1b"

    @pytest.mark.ollama(model="new:1b")
    def test_missing(ollama):
        assert 0
    """
    )
    result = project.pytest("-rs")
    assert (result.code, result.passed) == (0, 1), result.out
    assert f"no model new:1b at {server.host}" in result.out


def test_load_fails(project: Project, server: OllamaServer) -> None:
    """The tests of the model fail with the server's own words, the others run."""
    project.write(test_project=MARKED)
    server.errors["/api/generate"] = (500, "llama runner process has terminated: out of memory")
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (1, 12), result.out
    words = "cannot load a:1b: llama runner process has terminated: out of memory"
    assert words in result.out


def test_nothing_is_asked_without_such_tests(project: Project, server: OllamaServer) -> None:
    """A run without such tests asks nothing more, and imports nothing of it."""
    project.write(
        test_project="""
    import pytest, sys

    @pytest.mark.gpu(vram="4GB")
    def test_gpu():
        assert "pytest_gpushare.worker.ollama_fixture" not in sys.modules

    def test_nothing():
        pass
    """
    )
    project.write(
        conftest="""
    import sys

    def pytest_unconfigure(config):
        names = [name for name in sys.modules if name.startswith("pytest_gpushare")]
        parts = ("llm", "model_queue", "model_dispatch", "llm_loads", "model_turns", "model_tests")
        found = [name for name in names if name.rpartition(".")[2] in parts]
        assert not found, found
    """
    )
    result = project.pytest("--gpu-share", "-n2", "-o", "gpu_share_cpu_workers=auto")
    assert (result.code, result.passed) == (0, 2), result.out + result.err
    assert {r.path for r in server.requests} <= {"/api/version", "/api/ps"}


def test_example(project: Project, server: OllamaServer) -> None:
    """The project of the how-to page, as a user runs it: with the model, and without a server."""
    model = Model("qwen2.5:0.5b", "1GB")
    server.models[model.full_name] = model
    shutil.copytree(EXAMPLE, project.path, dirs_exist_ok=True)
    result = project.pytest("tests", "-n2")
    assert (result.code, result.passed) == (0, 3), result.out
    assert "gpu-share: 2 tests used 1 Ollama model: 1 load" in result.out
    assert "gpu-share: qwen2.5:0.5b gave 6 tokens in recorded answers" in result.out
    result = project.pytest("tests", "-n1", OLLAMA_HOST="127.0.0.1:9")
    assert (result.code, result.passed) == (0, 1), result.out
    assert "gpu-share: 2 tests skipped: no Ollama at 127.0.0.1:9: nothing listens" in result.out


PHASED = (
    SUITE
    + """
    import contextlib, gpusim

    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.gpu(vram="5GB")
    def test_gpu(i):
        with gpusim.alloc("4.3GB") if gpusim.available() else contextlib.nullcontext():
            time.sleep(0.3)

    @pytest.mark.parametrize("i", range(4))
    def test_answer(i):
        ask("large:30b", 0.1)
"""
)


def spills(server: OllamaServer) -> list[str]:
    """Models of which a load left a part on the CPU."""
    return server.scheduler.spills


@pytest.mark.parametrize("phase", ["auto", "before", "after"])
def test_model_that_does_not_fit_beside_the_tests(
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
    phase: str,
) -> None:
    """18 GB beside tests of 5 GB on 24 GB: one after the other, no spill, nobody out of memory."""
    machine_with(Device(total="24GB", used="1GB"))
    server = ollama_with([Model("large:30b", "18GB")])
    project.write(test_project=PHASED)
    project.file(
        "pytest.ini",
        f"""
        [pytest]
        gpu_share = true
        gpu_share_ollama_vram_reservation_mb = auto
        gpu_share_ollama_models = large:30b
        gpu_share_ollama_context = 4096
        gpu_share_ollama_tests = test_project.py::test_answer = large:30b
        gpu_share_ollama_phase = {phase}
        """,
    )
    result = project.pytest("-vv")
    assert (result.code, result.passed) == (0, 8), result.out + result.err
    assert "gpu-share: 2 GPU workers" in result.out
    assert server.scheduler.loads == ["large:30b"]
    assert spills(server) == []
    assert "gpu-share: tests that use models, as estimated: beside " in result.out


def test_beside_keeps_the_reservation(
    project: Project, machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]
) -> None:
    """The same suite without phases: no GPU worker fits next to the model."""
    machine_with(Device(total="24GB", used="1GB"))
    server = ollama_with([Model("large:30b", "18GB")])
    project.write(test_project=PHASED)
    options = ["gpu_share_ollama_vram_reservation_mb=auto", "gpu_share_ollama_phase=beside"]
    options += ["gpu_share_ollama_models=large:30b"]
    options += ["gpu_share_ollama_tests=test_project.py::test_answer = large:30b"]
    result = project.pytest("--gpu-share", "-n2", *(p for o in options for p in ("-o", o)))
    assert (result.code, result.passed) == (0, 8), result.out
    assert "gpu-share: 2 CPU workers (insufficient VRAM per worker" in result.out
    assert spills(server) == []


def test_crash_and_first_failure(project: Project, server: OllamaServer) -> None:
    """A crash in one test of a model loses no other; under -x nothing hangs."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.parametrize("i", range(6))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b", 0.02)
        if i == 2:
            os._exit(1)

    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.ollama(model="b:1b")
    def test_b(i):
        ask("b:1b", 0.02)
    """
    )
    result = project.pytest("--gpu-share", "-n2")
    assert (result.code, result.passed) == (1, 8), result.out
    assert "crashed" in result.out
    assert sorted(server.scheduler.loads) == ["a:1b", "b:1b"]
    result = project.pytest("--gpu-share", "-n2", "-x")
    assert result.code in (1, 2), result.out


@pytest.mark.parametrize("dist", ["loadscope", "loadfile", "worksteal"])
def test_groups_of_xdist(project: Project, server: OllamaServer, dist: str) -> None:
    """A group stays on one worker, in order, though its tests use two models."""
    project.write(
        test_project=SUITE
        + """
    MODELS = ["a:1b", "b:1b"]

    @pytest.mark.xdist_group("together")
    class TestTogether:
        @pytest.mark.parametrize("i", range(4))
        def test_it(self, i, worker_id):
            ask(MODELS[i % 2], 0.02)
            with open("order.txt", "a") as file:
                file.write(f"{worker_id} {i}\\n")

    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b", 0.02)
    """
    )
    project.file(
        "pytest.ini",
        """
        [pytest]
        gpu_share = true
        gpu_share_ollama_tests =
            test_project.py::TestTogether::test_it[[0]] = a:1b
            test_project.py::TestTogether = b:1b
        """.replace("[[0]]", "[0]"),
    )
    result = project.pytest("-n3", f"--dist={dist}")
    assert (result.code, result.passed) == (0, 8), result.out
    assert most_at_once(server, "a:1b") <= 2
    rows = [row.split() for row in (project.path / "order.txt").read_text().splitlines()]
    if dist != "worksteal":
        assert len({worker for worker, _ in rows}) == 1
        assert [number for _, number in rows] == ["0", "1", "2", "3"]


def test_run_again_and_last_failed(project: Project, server: OllamaServer) -> None:
    """Reruns count as tests of the model, and --lf runs only what failed."""
    project.write(
        test_project=SUITE
        + """
    import pathlib

    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b", 0.02)
        path = pathlib.Path(f"seen{i}")
        if i == 1 and not path.exists():
            path.write_text("")
            assert 0
    """
    )
    result = project.pytest("--gpu-share", "-n2", "--reruns=1", beside=["rerunfailures"])
    assert (result.code, result.passed) == (0, 3), result.out
    assert most_at_once(server, "a:1b") == 1
    (project.path / "seen1").unlink()
    command = inner_command("--gpu-share", "-n1", beside=["cacheprovider"])
    assert project.command(command).code == 1
    last = project.command([*command, "--lf"])
    assert (last.code, last.passed) == (0, 1), last.out


@pytest.mark.parametrize("workers", ["-n2", "-n0"])
def test_stepwise(project: Project, server: OllamaServer, workers: str) -> None:
    """It stops at the failure and goes on there, as in stock; one test at a time as ever."""
    project.write(
        test_project=SUITE
        + """
    import pathlib

    @pytest.mark.parametrize("i", range(5))
    @pytest.mark.ollama(model="a:1b")
    def test_a(i):
        ask("a:1b", 0.02)
        assert i != 2 or pathlib.Path("is-right").exists()
    """
    )
    command = inner_command("--gpu-share", workers, "--sw", beside=["cacheprovider"])
    first = project.command(command)
    # The test that follows may be under way on a worker, as in stock.
    assert first.code == 2, first.out
    assert first.passed == 2 or (workers == "-n2" and first.passed == 3), first.out
    project.file("is-right", "")
    second = project.command(command)
    assert (second.code, second.passed) == (0, 3), second.out
    assert server.scheduler.loads == ["a:1b"]
    assert most_at_once(server, "a:1b") == 1


def test_reload_is_named_with_its_remedy(project: Project, server: OllamaServer) -> None:
    """A call by OpenAI's paths cannot set the context that the tests of the model declare."""
    project.write(
        test_project=SUITE
        + """
    def complete(ollama):
        body = {"model": ollama.model, "messages": [{"role": "user", "content": "a"}]}
        url = ollama.openai_base_url + "/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as a:
            return json.loads(a.read())

    @pytest.mark.parametrize("i", range(2))
    @pytest.mark.ollama(model="a:1b", context=2048)
    def test_both(ollama, i):
        ask(ollama.model, **ollama.options)
        complete(ollama)
        # Long enough to be seen.
        time.sleep(3)
    """
    )
    result = project.pytest("--gpu-share", "-n2")
    assert (result.code, result.passed) == (0, 2), result.out
    assert "gpu-share: hint: a:1b was loaded again while its tests ran" in result.out
    assert "PARAMETER num_ctx 2048 keeps one context" in result.out


def test_busy_server_is_asked_again(project: Project, server: OllamaServer) -> None:
    """A full queue of loads (503) is no failure until the time for a load is over."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.ollama(model="a:1b")
    def test_a():
        pass
    """
    )
    server.errors["/api/generate"] = (503, "server busy, please try again.")
    result = project.pytest("--gpu-share", "-n1", "-o", "gpu_share_ollama_load_timeout_s=3")
    assert (result.code, result.passed) == (1, 0), result.out
    assert "cannot load a:1b: " in result.out
    assert len([r for r in server.requests if r.path == "/api/generate"]) > 2


def test_unknown_arguments_of_a_foreign_marker(project: Project, server: OllamaServer) -> None:
    """Another suite's `ollama` marker is not an error; what means nothing here is named once."""
    project.write(
        test_project=SUITE
        + """
    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.ollama(backend="local", retries=2)
    def test_a(i):
        ask("a:1b", 0.02)
    """
    )
    result = project.pytest("--gpu-share", "-n2")
    assert (result.code, result.passed) == (0, 3), result.out
    assert result.out.count("gpu-share: @pytest.mark.ollama: backend, retries: means nothing") == 1
    # Nobody knows the model: nothing is loaded by the run, and one test at a time uses it.
    assert most_at_once(server, "a:1b") == 1


@pytest.mark.parametrize(("own", "least"), [("10s", 500), ("90s", 0)])
@pytest.mark.parametrize("workers", ["-n1", "-n0"])
def test_terminated(
    project: Project, server: OllamaServer, workers: str, own: str, least: float
) -> None:
    """SIGTERM gives a model back that was loaded for tests, as the end of the run does."""
    server.scheduler.settings = type(server.scheduler.settings)(keep_alive=own)
    project.write(
        test_project="""
    import pathlib, time
    import pytest

    @pytest.mark.ollama(model="a:1b")
    def test_a():
        pathlib.Path("began").touch()
        time.sleep(60)
    """
    )
    with running(project, workers) as process:
        wait_for((project.path / "began").exists)
        assert keeps(server, "a:1b") > least
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    assert 0 < keeps(server, "a:1b") <= int(own.rstrip("s"))


@pytest.mark.parametrize("workers", ["-n1", "-n0"])
def test_terminated_during_a_load(project: Project, server: OllamaServer, workers: str) -> None:
    """SIGTERM ends the load: the server, which is left by its client, keeps nothing of it."""
    settings = type(server.scheduler.settings)
    server.scheduler.settings = settings(keep_alive="10s", load_delay=3.0)
    project.write(
        test_project="""
    import pytest

    @pytest.mark.ollama(model="a:1b")
    def test_a():
        pass
    """
    )
    with running(project, workers) as process:
        wait_for(lambda: any(r.path == "/api/generate" for r in server.requests))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    time.sleep(3.0)
    assert server.ps() == []
