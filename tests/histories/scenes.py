"""A random suite, its machine, and who else takes VRAM meanwhile; a few seconds long."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from simulator import Device

HEAD = """
import json, subprocess, sys, time
import gpusim
import pytest

GB = 1024**3
KEPT = []

def note(nodeid):
    # What the process holds now is what it holds at the end of the call.
    with open("ends.jsonl", "a") as file:
        print(json.dumps({"nodeid": nodeid, "at": time.time()}), file=file)

def raw(gigabytes, seconds):
    with gpusim.alloc(f"{gigabytes}GB"):
        time.sleep(seconds)

def child(gigabytes, seconds):
    code = (
        "import gpusim, time\\n"
        f"with gpusim.alloc('{gigabytes}GB'): time.sleep({seconds})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    # What a dead process held is taken from it by whoever looks next: the log is to have it now.
    gpusim.mem_get_info()
"""

TORCH = """
import torch

def take(gigabytes):
    return torch.empty(int(gigabytes * GB), dtype=torch.uint8, device="cuda")

def counted(gigabytes, seconds):
    held = take(gigabytes)
    time.sleep(seconds)
"""

FIXTURES = """
@pytest.fixture
def held(request):
    HELD
    yield

@pytest.fixture(scope="module")
def model():
    MODEL
    yield
"""


class Scene(NamedTuple):
    """What there is, and the suite."""

    devices: tuple[Device, ...]
    workers: int
    arguments: tuple[str, ...]
    text: str
    framework: bool
    """Whether torch counts."""
    loaded: str
    """The model that Ollama has loaded; empty without Ollama."""
    loads_at: float
    """Seconds after which it is loaded; 0: before the run."""
    other: tuple[float, float] | None
    """GB that another process takes, and seconds after which; it holds them for 3 s."""

    def write(self, path: Path) -> None:
        """Write the project."""
        (path / "test_history.py").write_text(self.text)


def _steps(draw: random.Random, framework: bool) -> list[str]:
    """The body of a test: a few things that it does with VRAM, one after the other."""
    lines = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        size = draw.choice([0.25, 0.5, 1, 1.5, 2])
        seconds = draw.choice([0.02, 0.05, 0.1, 0.2, 0.5])
        lines.append(f"{'counted' if framework else 'raw'}({size}, {seconds})")
    return lines


def _long(draw: random.Random, framework: bool) -> list[str]:
    size = draw.choice([1, 2])
    return [f"{'counted' if framework else 'raw'}({size}, {draw.choice([2.2, 2.5])})"]


def _test(draw: random.Random, number: int, framework: bool) -> str:
    kind = draw.choice(["steps", "steps", "steps", "long", "held", "child", "nothing", "model"])
    arguments, before = "request", ""
    if kind == "nothing":
        body = [f"time.sleep({draw.choice([0.0, 0.05, 0.2])})"]
    elif kind == "long":
        body = _long(draw, framework)
    elif kind == "child":
        size = draw.choice([0.5, 1, 2])
        body = [f"child({size}, {draw.choice([0.1, 0.6, 2.2])})"]
    elif kind == "held":
        arguments = "request, held"
        size = draw.choice([0.5, 1, 2])
        before = f'@pytest.mark.parametrize("held", [{size}], indirect=True)\n'
        body = [f"time.sleep({draw.choice([0.05, 0.45, 0.6])})"]
    else:
        if kind == "model":
            arguments = "request, model"
        body = _steps(draw, framework)
    if not framework and draw.random() < 0.05:
        body.append("KEPT.append(gpusim.alloc('0.5GB'))")
    lines = "\n    ".join([*body, "note(request.node.nodeid)"])
    return f"{before}def test_{number}({arguments}):\n    {lines}\n"


def draw_scene(seed: int) -> Scene:
    """The scene of a seed."""
    draw = random.Random(seed)
    framework = draw.random() < 0.5
    with_ollama = draw.random() < 0.4
    totals = [draw.choice([16, 24, 24, 48]) for _ in range(draw.choice([1, 1, 1, 2]))]
    # Most drivers list processes with their sizes.
    mode = draw.choice(["normal"] * 8 + ["none", "hidden-memory"])
    devices = tuple(
        Device(total=f"{total}GB", used=f"{draw.choice([0.5, 1, 2])}GB", processes=mode)  # type: ignore[arg-type]
        for total in totals
    )
    workers = draw.choice([1, 2, 2, 3])
    arguments = ["--gpu-share", f"-n{workers}", "-v"]
    if not with_ollama:
        arguments.append("--gpu-share-preset=no-ollama")
    else:
        arguments += ["-o", "gpu_share_ollama_vram_reservation_mb=6144"]
    if draw.random() < 0.3:
        arguments.append("--gpu-share-preset=packed")
    if draw.random() < 0.2:
        arguments += ["-o", "gpu_share_empty_caches=always"]
    taken = "held = take({})" if framework else "held = gpusim.alloc(int({} * GB))"
    fixtures = FIXTURES.replace("MODEL", taken.format("1"))
    fixtures = fixtures.replace("HELD", taken.format("request.param"))
    parts = [HEAD, TORCH if framework else "", fixtures]
    parts += [_test(draw, number, framework) for number in range(draw.choice([4, 6, 8, 10]))]
    other = None
    if draw.random() < 0.25:
        other = draw.choice([0.5, 1.5]), draw.choice([0.0, 0.8, 1.5])
    return Scene(
        devices,
        workers,
        tuple(arguments),
        "\n\n".join(parts),
        framework,
        "m:7b" if with_ollama else "",
        draw.choice([0.0, 0.0, 1.0]) if with_ollama else 0.0,
        other,
    )
