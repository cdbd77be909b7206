"""A server on the simulated GPU: what models take, where they are put, what is said of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from simulator import Device, Machine

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.catalog import ask_models
from pytest_gpushare.ollama.prediction import Server, predict

from ..acceptance.conftest import Project
from .conftest import Start
from .scenes import GIB, MIB, NoGpuError, Scene, advice_in, ours, play, random_scene, stage
from .server import Installation, RealOllama
from .test_answers import PRELOAD, keeps

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("model", "context", "parallel", "cache_type"),
    [
        ("l1", 4096, 1, "f16"),
        ("l1", 16384, 1, "f16"),
        ("l1", 4096, 4, "f16"),
        ("l1", 16384, 1, "q8_0"),
        ("q3", 4096, 1, "f16"),
        ("q3s", 8192, 1, "f16"),
        ("g3", 4096, 1, "f16"),
        ("moe", 4096, 1, "f16"),
    ],
)
def test_prediction(
    model: str,
    context: int,
    parallel: int,
    cache_type: str,
    start: Start,
    machine_with: Callable[..., Machine],
    record_property: Callable[[str, object], None],
) -> None:
    """Weights, cache and buffers: within -1 and +5 % of what the server says, or NVML shows."""
    machine = machine_with(Device(total="12GB", used="0.5GB"), context="400MB")
    server = start(
        machine,
        OLLAMA_CONTEXT_LENGTH=str(context),
        OLLAMA_NUM_PARALLEL=str(parallel),
        OLLAMA_KV_CACHE_TYPE=cache_type,
    )
    entry = server.load(model)
    assert entry["size_vram"] == entry["size"]
    address = parse_address(server.host)
    (facts,) = ask_models(address, [model], time.monotonic() + 60, lambda _: None)
    predicted = predict(facts, Server(12 * GIB, server.version, context, parallel, cache_type))
    (held,) = [size for pid, size in machine.snapshot()[0].processes if pid in server.runners()]
    # With a sliding window the server's figure leaves one of the two caches out.
    measured = held - 400 * MIB if predicted.has_window else entry["size_vram"]
    record_property("figure", f"{predicted.buffers / measured:.4f}")
    sizes = (predicted.buffers, entry["size_vram"], held - 400 * MIB)
    shown = ", ".join(f"{size / MIB:.1f}" for size in sizes)
    print(f"{model} {context} × {parallel} {cache_type}: predicted, size_vram, NVML: {shown} MiB")
    assert 0.99 <= predicted.buffers / measured <= 1.05


def test_server_sees_the_simulated_gpu(start: Start, gpu: Machine) -> None:
    """Its process holds there what it says, and nothing is left when it has unloaded."""
    server = start(gpu)
    entry = server.load("l1")
    (runner,) = server.runners()
    held = dict(gpu.snapshot()[0].processes)
    assert entry["size_vram"] <= held[runner] <= entry["size_vram"] + 700 * MIB
    server.unload_all()
    assert gpu.snapshot()[0].processes == ()


def test_preload(start: Start, gpu: Machine, project: Project) -> None:
    """Loaded and kept with the server's own duration; counted as resident."""
    server = start(gpu, OLLAMA_KEEP_ALIVE="7m")
    result = project.pytest(
        *PRELOAD, "-n2", "-o", "gpu_share_ollama_vram_reservation_mb=auto",
        "-o", "gpu_share_ollama_models=l1",
    )  # fmt: skip
    assert (result.code, result.passed) == (0, 4), result.out
    assert "gpu-share: Ollama kept l1:latest on the GPU" in result.out
    assert 0 < keeps(server, "l1") <= 7 * 60
    assert server.entry("l1")["size_vram"] == server.entry("l1")["size"]
    loads = [seen for seen in server.requests() if seen.path == "/api/generate"]
    assert [seen.status for seen in loads] == [200]


def test_preload_of_what_does_not_fit(
    start: Start, machine_with: Callable[..., Machine], project: Project
) -> None:
    """It is not loaded: the server would put half of it on the CPU."""
    server = start(machine_with(Device(total="8GB", used="6.5GB")))
    result = project.pytest(*PRELOAD, "-n2", "-o", "gpu_share_ollama_models=l1")
    assert (result.code, result.passed) == (0, 4), result.out
    assert "it does not fit wholly on the GPU" in result.out
    assert server.ps() == []
    assert all(seen.path != "/api/generate" for seen in server.requests())


def test_preload_evicts_nothing(start: Start, gpu: Machine, project: Project) -> None:
    """Where the server keeps one model, what the user has loaded stays."""
    server = start(gpu, OLLAMA_MAX_LOADED_MODELS="1")
    server.load("tiny", keep_alive="20m")
    before, processes = server.ps(), server.runners()
    result = project.pytest(*PRELOAD, "-n2", "-o", "gpu_share_ollama_models=tiny-b")
    assert (result.code, result.passed) == (0, 4), result.out
    assert (server.ps(), server.runners()) == (before, processes)
    assert "tiny:latest is loaded, and loading another model might evict it" in result.out


def test_what_the_process_takes_is_learned(
    start: Start, machine_with: Callable[..., Machine], project: Project
) -> None:
    """A run beside the loaded model measures its CUDA context; the next one plans with it."""
    machine = machine_with(Device(total="8GB", used="0.5GB"), context="300MB")
    server = start(machine)
    server.load("l1", keep_alive="20m")
    auto = ("--gpu-share", "-n2", "-vv", "-o", "gpu_share_ollama_vram_reservation_mb=auto",
            "-o", "gpu_share_ollama_models=l1")  # fmt: skip
    command = (sys.executable, "-m", "pytest", *auto)
    assert project.command(command).code == 0
    kept = json.loads((project.path / ".pytest_cache/v/gpushare/ollama").read_text())
    (overhead,) = kept["processes"].values()
    assert 300 * MIB <= overhead <= 320 * MIB
    server.unload_all()
    result = project.command(command)
    assert result.code == 0
    assert "seen in an earlier run" in result.out


Staged = Callable[[Scene], tuple[RealOllama, Project]]


@pytest.fixture
def staged(library: Installation) -> Iterator[Staged]:
    """Build a scene: its server and project."""
    with ExitStack() as stack:

        def build(scene: Scene) -> tuple[RealOllama, Project]:
            try:
                return stack.enter_context(stage(scene, library))
            except NoGpuError as error:
                pytest.skip(str(error))

        yield build


def test_reservation_that_is_advised_is_enough(
    staged: Staged, record_property: Callable[[str, object], None]
) -> None:
    """Too little is reserved: the verdict has the server's figures, and its advice is enough."""
    # The tests have begun by then, also on a busy machine.
    scene = Scene(8192, 700, "kv", 32768, 1, 2500, 20, 3.0, delay=12.0)
    server, project = staged(scene)
    spilled = play(project, ours(scene, "512"))
    print(spilled.result.out)
    assert not spilled.is_whole, "the scene does not make the model spill"
    advice = advice_in(spilled.result)
    assert advice is not None, spilled.result.out
    size, placed = spilled.entry["size"] / GIB, spilled.entry["size_vram"] / GIB
    assert advice.size_gb == pytest.approx(size, abs=0.06)
    assert advice.on_cpu_gb == pytest.approx(size - placed, abs=0.06)
    server.unload_all()
    again = play(project, ours(scene, str(advice.reservation_mb)))
    record_property("figure", f"{advice.reservation_mb} MB")
    assert again.is_whole, again.result.out


@pytest.mark.parametrize("number", [1, 2])
def test_random_scene(number: int, staged: Staged) -> None:
    """Where the plan says that model and workers fit, the model is wholly on the GPU."""
    scene = random_scene(number)
    _, project = staged(scene)
    outcome = play(project, ours(scene))
    print(scene, outcome, sep="\n")
    assert outcome.is_whole, outcome.result.out
    fits = outcome.gpu_workers > 0 and scene.test + scene.cuda_context <= outcome.budget
    assert outcome.failed == 0 or not fits, outcome.result.out
