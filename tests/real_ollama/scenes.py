"""Random scenes beside a real Ollama: the run with the plugin, and with stock `pytest -n K`.

    python -m tests.real_ollama.scenes --count 30 --against 10

A card, what others hold of it, tests that hold VRAM, and a model that somebody asks for in the
middle of the run. Each scene must keep what the plan says: where the model and at least one
GPU worker fit, the model is loaded wholly on the GPU and no test runs out of memory. A second
kind of scene reserves too little: the verdict's figures must be the server's, and the reservation
that it advises must be enough in a second run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulator import Device, Machine, build
from simulator.build import build_vulkan_layer

from ..acceptance.conftest import Project, Result, clean_environment
from .server import Installation, RealOllama
from .shapes import QWEN14B, ZEROS

MIB, GIB = 1 << 20, 1 << 30

TESTS = """
    import time
    import gpusim
    import pytest

    @pytest.mark.gpu(vram="{declared}")
    @pytest.mark.parametrize("i", range({count}))
    def test_model(i):
        with gpusim.alloc("{size}"):
            time.sleep({seconds})
"""

# Somebody asks for the model in the middle of the run; what was placed is written down at once.
ASK = """
    import json, os, pathlib, threading, time, urllib.request

    def ask(path, body=None):
        url = f"http://{{os.environ['OLLAMA_HOST']}}{{path}}"
        request = urllib.request.Request(url, data=body and json.dumps(body).encode())
        return json.loads(urllib.request.urlopen(request, timeout=280).read())

    def load():
        time.sleep({delay})
        began = time.monotonic()
        ask("/api/generate", {{"model": "{model}", "keep_alive": "20m", "stream": False}})
        took = time.monotonic() - began
        (entry,) = ask("/api/ps")["models"]
        pathlib.Path("loaded.json").write_text(json.dumps({{"took": took, "entry": entry}}))

    def pytest_configure(config):
        config.addinivalue_line("markers", "gpu: needs a GPU")

    def pytest_sessionstart(session):
        if not hasattr(session.config, "workerinput"):
            thread = threading.Thread(target=load)
            thread.start()
            session.config.add_cleanup(lambda: thread.join(300))
"""


class Scene(NamedTuple):
    """What is on the card, and what is asked of it. Sizes are in MiB."""

    total: int
    used: int
    model: str
    context: int
    parallel: int
    test: int
    """What a test allocates; its process has a context beside it."""
    count: int
    seconds: float
    delay: float
    """Seconds into the run when the model is asked for."""
    cuda_context: int = 400
    workers: int = 4

    def __str__(self) -> str:
        card = f"{self.total / 1024:g} GB, {(self.total - self.used) / 1024:.1f} free"
        model = f"{self.model} {self.context} × {self.parallel}"
        return f"{card}; {model}; {self.count} tests of {self.test / 1024:.1f} GB"


FOUNDING = Scene(24576, 2048, "q14", 8192, 1, 7680 - 600, 28, 4.0, 5.0, 600, 3)
"""The founding write-up's: a 14B model beside tests of 7.5 GB on 24 GB."""


def random_scene(number: int) -> Scene:
    """Scene *number*."""
    draw = random.Random(number)
    return Scene(
        total=draw.choice((6, 8, 10, 12)) * 1024,
        used=draw.randrange(300, 1100, 50),
        model=draw.choice(("l1", "l1", "q3s", "q3", "g3")),
        context=draw.choice((2048, 4096, 8192, 16384)),
        parallel=draw.choice((1, 1, 2)),
        test=draw.randrange(800, 2500, 100),
        count=draw.randrange(12, 20),
        seconds=draw.uniform(1.0, 2.0),
        delay=draw.uniform(2.0, 6.0),
    )


class Outcome(NamedTuple):
    """How a scene ended."""

    result: Result
    entry: dict[str, Any]
    """The model as /api/ps listed it as soon as it was loaded."""
    took: float
    """Seconds that the request for it took."""
    makespan: float
    """Seconds that pytest says."""
    gpu_workers: int
    peak: int
    """The most VRAM in use, in MiB."""

    @property
    def share(self) -> float:
        """Of the model, what is on the GPU."""
        return float(self.entry["size_vram"]) / float(self.entry["size"])

    @property
    def is_whole(self) -> bool:
        return bool(self.entry["size_vram"] == self.entry["size"])

    @property
    def failed(self) -> int:
        match = re.search(r"(\d+) failed", self.result.out)
        return int(match[1]) if match else 0

    def __str__(self) -> str:
        placed, size = (self.entry[key] / GIB for key in ("size_vram", "size"))
        return (
            f"{self.result.passed} passed, {self.failed} failed in {self.makespan:.1f} s; "
            f"model {placed:.2f} of {size:.2f} GB on the GPU after {self.took:.1f} s; "
            f"peak {self.peak / 1024:.1f} GB"
        )


@contextmanager
def stage(scene: Scene, installation: Installation) -> Iterator[tuple[RealOllama, Project]]:
    """The scene's card, server and project."""
    with tempfile.TemporaryDirectory() as folder:
        device = Device(total=f"{scene.total}MB", used=f"{scene.used}MB")
        path = Path(folder, "vram")
        machine = Machine.create(path, [device], context=f"{scene.cuda_context}MB")
        directory = Path(folder, "project")
        directory.mkdir()
        project = Project(directory, clean_environment())
        project.environment.update(machine.env(build(Path(folder, "nvml")).parent))
        project.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = str(scene.workers)
        project.write(
            test_project=TESTS.format(
                declared=f"{scene.test + scene.cuda_context}MB", count=scene.count,
                size=f"{scene.test}MB", seconds=scene.seconds,
            ),
            conftest=ASK.format(delay=scene.delay, model=scene.model),
        )  # fmt: skip
        variables = {
            "OLLAMA_CONTEXT_LENGTH": str(scene.context),
            "OLLAMA_NUM_PARALLEL": str(scene.parallel),
        }
        with RealOllama(installation, machine, **variables) as server:
            project.environment["OLLAMA_HOST"] = server.host
            yield server, project


def ours(scene: Scene, reservation: str = "auto") -> list[str]:
    """The arguments of a run with the plugin."""
    settings = {
        "ollama_vram_reservation_mb": reservation,
        "ollama_models": scene.model,
        "ollama_context": str(scene.context),
        "ollama_parallel": str(scene.parallel),
        "ollama_timeout_s": "10",
        "safety_buffer_mb": "256",
        "preset": "packed",
    }
    options = [f"gpu_share_{key}={value}" for key, value in settings.items()]
    return ["--gpu-share", "-n", str(scene.workers), *(f"-o{option}" for option in options)]


def stock(scene: Scene) -> list[str]:
    """The arguments of a run without it."""
    return ["-n", str(scene.workers)]


def play(project: Project, arguments: list[str]) -> Outcome:
    """Run the scene's tests once."""
    (project.path / "loaded.json").unlink(missing_ok=True)
    result = project.pytest("-q", *arguments)
    text = (project.path / "loaded.json").read_text(encoding="utf-8")
    machine = Machine.open(Path(project.environment["GPUSHARE_SIM_STATE"]))
    loaded = json.loads(text)
    seconds = re.search(r" in (\d+\.\d+)s", result.out)
    workers = re.search(r"gpu-share: (\d+) GPU worker", result.out)
    return Outcome(
        result, loaded["entry"], loaded["took"],
        float(seconds[1]) if seconds else 0.0, int(workers[1]) if workers else 0,
        machine.snapshot()[0].peak_used // MIB,
    )  # fmt: skip


def warm_up(scene: Scene, server: RealOllama) -> None:
    """Load and unload once, so that no run pays for kernels that are compiled at the first load."""
    server.load(scene.model)
    server.unload_all()


class Advice(NamedTuple):
    """What a verdict says of a spill."""

    on_cpu_gb: float
    size_gb: float
    reservation_mb: int


def advice_in(result: Result) -> Advice | None:
    """The figures of the line on a spill; None where there is none."""
    told = re.search(r"put (\d+\.\d+) GB of \S+ \((\d+\.\d+) GB\) on the CPU", result.out)
    named = re.search(r"gpu_share_ollama_vram_reservation_mb = (\d+) would", result.out)
    if told is None or named is None:
        return None
    return Advice(float(told[1]), float(told[2]), int(named[1]))


def main() -> None:
    """Print a line for each run; exit code 1 where a scene did not keep its promise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--against", type=int, default=0, help="scenes to run with stock, too")
    parser.add_argument("--founding", action="store_true", help="the founding scene alone")
    options = parser.parse_args()
    installation = _installation()
    broken = 0
    scenes = {number: random_scene(number) for number in
              range(options.first, options.first + options.count)}  # fmt: skip
    if options.founding:
        scenes = {0: FOUNDING}
    for number, scene in scenes.items():
        with stage(scene, installation) as (server, project):
            if not server.uses_gpu:
                raise SystemExit("the server sees no simulated GPU")
            installation.add(scene.model, {**ZEROS, "q14": QWEN14B}[scene.model])
            warm_up(scene, server)
            print(f"{number:3} {scene}", flush=True)
            arguments = ["--gpu-share"] if options.founding else ours(scene)
            outcome = play(project, arguments)
            fits = outcome.gpu_workers > 0
            kept = outcome.is_whole and (outcome.failed == 0 or not fits)
            broken += not kept
            print(f"    ours  {outcome}; {outcome.gpu_workers} GPU workers"
                  f"{'' if kept else '; BROKEN'}", flush=True)  # fmt: skip
            if not kept:
                print(outcome.result.out[-3000:])
            if options.founding or number < options.first + options.against:
                server.unload_all()
                print(f"    stock {play(project, stock(scene))}", flush=True)
    print(f"{len(scenes)} scenes, {broken} broken")
    raise SystemExit(1 if broken else 0)


def _installation() -> Installation:
    executable = os.environ.get("GPUSHARE_TEST_OLLAMA") or shutil.which("ollama")
    kept = os.environ.get("GPUSHARE_TEST_OLLAMA_CACHE")
    if not executable or not kept:
        raise SystemExit("set GPUSHARE_TEST_OLLAMA and GPUSHARE_TEST_OLLAMA_CACHE")
    directory = Path(kept).absolute()
    return Installation(executable, directory, build_vulkan_layer(directory / "layer"))


if __name__ == "__main__":
    main()
