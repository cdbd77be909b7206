"""Sessions of one host whose tests use models of one server: they take turns and share places."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.child import wait_for
from simulator.ollama import Model, OllamaServer

from .conftest import Project, Result
from .test_llm import SUITE

pytestmark = pytest.mark.xdist_group("llm-sessions")


@pytest.fixture
def server(machine_with: Callable[..., Machine], ollama_with: Callable[..., Any]) -> OllamaServer:
    """24 GB, 22 GB free, and an Ollama that holds one model at a time."""
    machine_with(Device(total="24GB", used="2GB"))
    return ollama_with(
        [
            Model("a:1b", "1GB"),
            Model("b:1b", "1GB"),
            Model("large:30b", "17GB"),
            Model("larger:34b", "19GB"),
        ],
        max_loaded=1,
        load_delay=0.3,
    )


def suite_of(model: str, count: int, seconds: float) -> str:
    """A module of so many tests of a model, with one of another kind."""
    return (
        SUITE
        + f"""
    @pytest.mark.parametrize("i", range({count}))
    @pytest.mark.ollama(model="{model}")
    def test_answer(i):
        began = time.time()
        ask("{model}", {seconds})
        session = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
        with open("times", "a") as file:
            print(session, began, time.time(), file=file)

    def test_other():
        pass
    """
    )


def at_once(project: Project, runs: list[list[str]]) -> list[Result]:
    """The runs, all at the same time."""
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(project.pytest, "--gpu-share", *each) for each in runs]
        return [run.result(timeout=150) for run in started]


def times_in_use(project: Project) -> int:
    """How often sessions began to use a model while none of the others did."""
    spans: dict[str, tuple[float, float]] = {}
    for line in (project.path / "times").read_text().splitlines():
        session, *times = line.split()
        began, ended = map(float, times)
        first, last = spans.get(session, (began, ended))
        spans[session] = min(first, began), max(last, ended)
    count, until = 0, 0.0
    for began, ended in sorted(spans.values()):
        count += began > until
        until = max(until, ended)
    return count


@pytest.mark.parametrize("workers", ["-n2", "-n0"])
def test_two_models(project: Project, server: OllamaServer, workers: str) -> None:
    """Under MAX_LOADED_MODELS 1 each model is loaded once: the second waits for the first."""
    project.write(test_one=suite_of("a:1b", 8, 0.2), test_two=suite_of("b:1b", 8, 0.2))
    results = at_once(project, [["test_one.py", workers], ["test_two.py", workers]])
    for result in results:
        assert (result.code, result.passed) == (0, 9), result.out
    assert sorted(server.scheduler.loads) == ["a:1b", "b:1b"]
    assert server.scheduler.spills == []


@pytest.mark.parametrize(("workers", "parallel"), [("-n2", 1), ("-n3", 2), ("-n0", 1)])
def test_one_model(project: Project, server: OllamaServer, workers: str, parallel: int) -> None:
    """No more tests of all sessions use it at once than the server answers."""
    server.scheduler.settings = type(server.scheduler.settings)(max_loaded=1, parallel=parallel)
    project.write(test_one=suite_of("a:1b", 10, 0.2), test_two=suite_of("a:1b", 10, 0.2))
    option = ["-o", f"gpu_share_ollama_parallel={parallel}", workers]
    names = ["test_one.py", "test_two.py", "test_one.py"]
    results = at_once(project, [[name, *option] for name in names])
    for result in results:
        assert (result.code, result.passed) == (0, 11), result.out
    # On a busy machine one may be over before another starts.
    assert set(server.scheduler.loads) == {"a:1b"}
    assert len(server.scheduler.loads) <= times_in_use(project)
    assert server.scheduler.most_at_once["a:1b"] == parallel


def test_large_model_beside_gpu_tests_of_another_session(
    project: Project, server: OllamaServer
) -> None:
    """It waits for the VRAM that the other session has leased: no spill, nobody out of memory."""
    project.write(
        test_gpu="""
    import pathlib, time
    import pytest, gpusim

    @pytest.mark.parametrize("i", range(60))
    @pytest.mark.gpu(vram="5GB")
    def test_gpu(i):
        pathlib.Path("begun").touch()
        with gpusim.alloc("4.3GB"):
            time.sleep(0.4)
    """,
        test_llm=suite_of("large:30b", 4, 0.2),
    )
    options = [
        "gpu_share_ollama_vram_reservation_mb=auto",
        "gpu_share_ollama_models=large:30b",
        "gpu_share_ollama_context=4096",
        "gpu_share_ollama_tests=test_llm.py::test_answer = large:30b",
    ]
    llm = [
        "test_llm.py",
        "-n1",
        "-vv",
        "--gpu-share-report=r.json",
        *(part for option in options for part in ("-o", option)),
    ]
    gpu = ["test_gpu.py", "-n2", "-o", "gpu_share_ollama_vram_reservation_mb=0"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(project.pytest, "--gpu-share", *gpu)
        wait_for((project.path / "begun").exists)
        second = pool.submit(project.pytest, "--gpu-share", *llm)
        results = [first.result(timeout=150), second.result(timeout=150)]
    for result, count in zip(results, (60, 5), strict=True):
        assert (result.code, result.passed) == (0, count), result.out
    assert server.scheduler.loads == ["large:30b"]
    assert server.scheduler.spills == [], results[0].out + results[1].out


def test_leased_vram_that_does_not_come_back(project: Project, server: OllamaServer) -> None:
    """A session that makes no progress is waited for only so long: the tests of the model fail
    with its name, and the others run."""
    project.write(
        test_gpu="""
    import pathlib, time
    import pytest, gpusim

    @pytest.mark.gpu(vram="8GB")
    def test_gpu():
        with gpusim.alloc("7GB"):
            pathlib.Path("begun").touch()
            until = time.monotonic() + 90
            while not pathlib.Path("over").exists() and time.monotonic() < until:
                time.sleep(0.05)
    """,
        test_llm=suite_of("large:30b", 3, 0.1),
    )
    llm = ["test_llm.py", "-n1", "-o", "gpu_share_ollama_load_timeout_s=2"]
    for option in (
        "gpu_share_ollama_vram_reservation_mb=auto",
        "gpu_share_ollama_models=large:30b",
        "gpu_share_ollama_context=4096",
        "gpu_share_ollama_tests=test_llm.py::test_answer = large:30b",
    ):
        llm += ["-o", option]
    gpu = ["test_gpu.py", "-n1", "-o", "gpu_share_ollama_vram_reservation_mb=0"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(project.pytest, "--gpu-share", *gpu)
        wait_for((project.path / "begun").exists)
        result = project.pytest("--gpu-share", *llm)
        project.file("over", "")
        other = first.result(timeout=150)
    assert (other.code, other.passed) == (0, 1), other.out
    assert (result.code, result.passed) == (1, 1), result.out
    assert "3 failed" in result.out
    assert re.search(
        r"large:30b needs \S+ GB of VRAM, which other sessions have leased: waited \d+ s: pid \d+",
        result.out,
    ), result.out
    assert server.scheduler.loads == []


def test_gpu_tests_wait_for_the_model_of_another_session(
    project: Project, server: OllamaServer
) -> None:
    """They do not fall to CPU workers: the model is unloaded when its tests are over."""
    project.write(
        test_gpu="""
    import os
    import pytest, gpusim

    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.gpu(vram="5GB")
    def test_gpu(i):
        assert os.environ["CUDA_VISIBLE_DEVICES"]
        with gpusim.alloc("4.3GB"):
            pass
    """,
        test_llm=suite_of("larger:34b", 8, 2.5),
    )
    gpu = ["test_gpu.py", "-n2", "-o", "gpu_share_ollama_vram_reservation_mb=0"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(project.pytest, "--gpu-share", "test_llm.py", "-n1")
        wait_for(lambda: server.scheduler.loads)
        second = project.pytest("--gpu-share", *gpu)
        result = first.result(timeout=150)
    assert (result.code, result.passed) == (0, 9), result.out
    assert (second.code, second.passed) == (0, 3), second.out
    assert "CPU worker" not in second.out
    assert server.scheduler.spills == []
