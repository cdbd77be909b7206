"""Random scenes beside a real Ollama: the run with the plugin, and with stock `pytest -n K`.

    python -m tests.real_ollama.scenes --count 30 --against 10
    python -m tests.real_ollama.scenes --count 10 --advice
    python -m tests.real_ollama.scenes --founding --against 1
    python -m tests.real_ollama.scenes --count 10 --requests

A card, what others hold of it, tests that hold VRAM, and a model that somebody asks for in the
middle of the run. Each scene must keep what the plan says: where the model and at least one
GPU worker fit, the model is loaded wholly on the GPU and no test runs out of memory. A second
kind of scene reserves too little: the verdict's figures must be the server's, and the reservation
that it advises must be enough in a second run. A third kind asks a model that answers over and
over, and compares how long that takes with the plugin, with stock xdist, and without a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulator import Device, Machine, build
from simulator.build import build_vulkan_layer

from ..acceptance.conftest import Project, Result, clean_environment
from .server import LOAD_LIMIT, AnswerError, Installation, RealOllama
from .shapes import QWEN14B, TINY, ZEROS

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
        began, failure, entry = time.monotonic(), "", None
        try:
            ask("/api/generate", {{"model": "{model}", "keep_alive": "20m", "stream": False}})
            (entry,) = ask("/api/ps")["models"]
        except Exception as error:
            failure = f"{{error}}: {{getattr(error, 'read', str)()}}"
        found = {{"took": time.monotonic() - began, "entry": entry, "failure": failure}}
        pathlib.Path("loaded.json").write_text(json.dumps(found))

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
    model, contexts = draw.choice(
        (
            *(("kv", (8192, 16384, 32768, 65536)),) * 4,
            ("l1", (2048, 4096, 8192, 16384)),
            ("q3s", (2048, 4096, 8192)),
            ("g3", (4096, 16384)),
        )
    )
    return Scene(
        total=draw.choice((6, 8, 10, 12)) * 1024,
        used=draw.randrange(300, 1100, 50),
        model=model,
        context=draw.choice(contexts),
        parallel=draw.choice((1, 1, 2)),
        test=draw.randrange(800, 2500, 100),
        count=draw.randrange(12, 20),
        seconds=draw.uniform(0.8, 1.6),
        delay=draw.uniform(2.0, 6.0),
    )


class Caller:
    """Asks a loaded model over and over while the block runs."""

    def __init__(self, server: RealOllama) -> None:
        self.seconds: list[float] = []
        """How long each answer took."""
        self.failures: list[str] = []
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join(LOAD_LIMIT)

    def __str__(self) -> str:
        median, *_, late = statistics.quantiles(self.seconds, n=20, method="inclusive")[9:]
        median, late, most = (1000 * each for each in (median, late, max(self.seconds)))
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"{len(self.seconds)} answers{failed}: "
            f"median {median:.0f} ms, 95 % {late:.0f}, most {most:.0f}"
        )

    def _ask(self) -> None:
        body = {"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 8}}
        while not self._is_over.wait(0.1):
            began = time.monotonic()
            try:
                self._server.post("/api/generate", body)
                self.seconds.append(time.monotonic() - began)
            except (AnswerError, OSError) as error:
                self.failures.append(str(error))


class NoGpuError(RuntimeError):
    """The server sees no simulated GPU."""


class Outcome(NamedTuple):
    """How a scene ended."""

    result: Result
    entry: dict[str, Any]
    """The model as /api/ps listed it as soon as it was loaded; empty where that failed."""
    failure: str
    """How the request for it failed; empty where it did not."""
    took: float
    """Seconds that the request for it took."""
    makespan: float
    """Seconds that pytest says."""
    gpu_workers: int
    budget: int
    """What the plan leaves to tests on the device, in MiB."""
    peak: int
    """The most VRAM in use, in MiB."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the model is on the GPU."""
        return bool(self.entry) and bool(self.entry["size_vram"] == self.entry["size"])

    @property
    def failed(self) -> int:
        match = re.search(r"(\d+) failed", self.result.out)
        return int(match[1]) if match else 0

    def __str__(self) -> str:
        if self.entry:
            placed, size = (self.entry[key] / GIB for key in ("size_vram", "size"))
            model = f"model {placed:.2f} of {size:.2f} GB on the GPU"
        else:
            model = f"model not loaded ({self.failure})"
        return (
            f"{self.result.passed} passed, {self.failed} failed in {self.makespan:.1f} s; "
            f"{model} after {self.took:.1f} s; peak {self.peak / 1024:.1f} GB"
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
        project.limit = 600.0
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
            if not server.uses_gpu:
                raise NoGpuError(
                    "the server sees no simulated GPU: no Vulkan backend, or no llvmpipe"
                )
            project.environment["OLLAMA_HOST"] = server.host
            yield server, project


def ours(scene: Scene, reservation: str = "auto") -> list[str]:
    """The arguments of a run with the plugin."""
    settings = {
        "ollama_vram_reservation_mb": reservation,
        "ollama_models": scene.model,
        "ollama_context": str(scene.context),
        "ollama_parallel": str(scene.parallel),
        "ollama_timeout_s": "20",
        "safety_buffer_mb": "256",
        "preset": "packed",
    }
    options = [f"gpu_share_{key}={value}" for key, value in settings.items()]
    options = [f"-o{option}" for option in options]
    return ["--gpu-share", "--gpu-share-report=r.json", "-n", str(scene.workers), *options]


def stock(scene: Scene) -> list[str]:
    """The arguments of a run without it."""
    return ["-n", str(scene.workers)]


def play(project: Project, arguments: list[str]) -> Outcome:
    """Run the scene's tests once."""
    (project.path / "loaded.json").unlink(missing_ok=True)
    result = project.pytest(*arguments)
    text = (project.path / "loaded.json").read_text(encoding="utf-8")
    machine = Machine.open(Path(project.environment["GPUSHARE_SIM_STATE"]))
    loaded = json.loads(text)
    seconds = re.search(r"^=+ .* in (\d+\.\d+)s", result.out, re.MULTILINE)
    workers = budget = 0
    if "--gpu-share" in arguments:
        report = json.loads((project.path / "r.json").read_text(encoding="utf-8"))
        workers = report["plan"]["gpu_workers"]
        budget = report["devices"][0]["budget_bytes"] // MIB
    return Outcome(
        result,
        loaded["entry"] or {},
        loaded["failure"],
        loaded["took"],
        float(seconds[1]) if seconds else 0.0,
        workers,
        budget,
        machine.snapshot()[0].peak_used // MIB,
    )


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


def check(number: int, scene: Scene, installation: Installation) -> bool:
    """Play a scene with the plugin; whether it kept what the plan says."""
    arguments = ["--gpu-share", "--gpu-share-report=r.json"] if number == 0 else ours(scene)
    with stage(scene, installation) as (server, project):
        outcome = play(project, arguments)
        fits = outcome.gpu_workers > 0 and scene.test + scene.cuda_context <= outcome.budget
        said = "" if fits else "; the plan says that tests and model do not fit together"
        print(f"    ours  {outcome}; {', '.join(server.layers()[-1:])} layers;"
              f" {outcome.gpu_workers} GPU workers{said}", flush=True)  # fmt: skip
    is_kept = outcome.is_whole and (outcome.failed == 0 or not fits)
    if not is_kept:
        print(f"    BROKEN\n{outcome.result.out[-3000:]}", flush=True)
    return is_kept


def play_stock(scene: Scene, installation: Installation) -> None:
    """Play a scene with stock xdist."""
    with stage(scene, installation) as (server, project):
        outcome = play(project, stock(scene))
        print(f"    stock {outcome}; {', '.join(server.layers()[-1:])} layers", flush=True)


def check_advice(scene: Scene, installation: Installation) -> bool | None:
    """Reserve too little; whether what is said of the spill is true. None: no spill to see."""
    # Two tests at once leave less than the model needs; they have begun before it is asked for,
    # also on a busy machine.
    size = (scene.total - scene.used) // 2 - 900
    scene = scene._replace(test=size, count=14, seconds=4.0, delay=12.0)
    with stage(scene, installation) as (server, project):
        print(f"    tests of {scene.test / 1024:.1f} GB", flush=True)
        small = play(project, ours(scene, "512"))
        print(f"    512 MB reserved: {small}", flush=True)
        if small.is_whole or not small.entry or scene.delay + small.took > small.makespan - 3:
            return None  # or it was still being loaded when the run ended
        told = advice_in(small.result)
        size, placed = (small.entry[key] / GIB for key in ("size", "size_vram"))
        if told is None:
            print(f"    BROKEN: no advice\n{small.result.out[-3000:]}", flush=True)
            return False
        print(f"    {told}", flush=True)
        is_true = abs(told.size_gb - size) < 0.06 and abs(told.on_cpu_gb - size + placed) < 0.06
        server.unload_all()
        again = play(project, ours(scene, str(told.reservation_mb)))
        print(f"    {told.reservation_mb} MB reserved: {again}", flush=True)
        if not (is_true and again.is_whole):
            print(f"    BROKEN\n{small.result.out[-3000:]}\n{again.result.out[-3000:]}", flush=True)
        return is_true and again.is_whole


def compare_requests(scene: Scene, installation: Installation) -> None:
    """Ask a small model while nothing runs, while the plugin runs, and while stock xdist does."""
    scene = scene._replace(model="tiny", context=2048, parallel=1)
    with stage(scene, installation) as (server, project):
        server.load(scene.model, keep_alive="1h")
        with Caller(server) as caller:
            time.sleep(5)
        print(f"    alone {caller}", flush=True)
        for name, arguments in (("ours", ours(scene)), ("stock", stock(scene))):
            with Caller(server) as caller:
                outcome = play(project, arguments)
            print(f"    {name:5} {caller}; {outcome}", flush=True)


def main() -> None:
    """Print a line for each run; exit code 1 where a scene did not keep its promise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--against", type=int, default=0, help="scenes to run with stock, too")
    parser.add_argument("--founding", action="store_true", help="the founding scene alone")
    parser.add_argument("--advice", action="store_true", help="reserve too little, follow advice")
    parser.add_argument("--requests", action="store_true", help="how long requests take meanwhile")
    parser.add_argument("--stock", action="store_true", help="stock xdist alone")
    options = parser.parse_args()
    # So that the server ends with this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    installation = _installation()
    installation.add("tiny", TINY, seed=1)
    for name, shape in (ZEROS | ({"q14": QWEN14B} if options.founding else {})).items():
        installation.add(name, shape)
    numbers = [0] if options.founding else list(range(options.first, options.first + options.count))
    kept: list[bool | None] = []
    for number in numbers:
        scene = random_scene(number) if number else FOUNDING
        print(f"{number:3} {scene}", flush=True)
        if options.requests:
            compare_requests(scene, installation)
            continue
        if options.advice:
            kept.append(check_advice(scene, installation))
        elif not options.stock:
            kept.append(check(number, scene, installation))
        if options.stock or number in numbers[: options.against]:
            play_stock(scene, installation)
    spilled = f", {kept.count(None)} without a spill to see" if options.advice else ""
    print(f"{len(kept)} scenes{spilled}, {kept.count(False)} broken")
    raise SystemExit(1 if False in kept else 0)


def _installation() -> Installation:
    executable = os.environ.get("GPUSHARE_TEST_OLLAMA") or shutil.which("ollama")
    kept = os.environ.get("GPUSHARE_TEST_OLLAMA_CACHE")
    if not executable or not kept:
        raise SystemExit("set GPUSHARE_TEST_OLLAMA and GPUSHARE_TEST_OLLAMA_CACHE")
    directory = Path(kept).absolute()
    return Installation(executable, directory, build_vulkan_layer(directory / "layer"))


if __name__ == "__main__":
    main()
