"""The scene of a benchmark: a project, a simulated machine, an Ollama."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulator import Device, Machine, build
from simulator.ollama import OllamaServer

LIMIT = 300.0
"""Seconds that one command of a benchmark may take, beyond what it is asked to take."""

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TRIVIAL = "import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test_nothing(i): pass\n"


class Scene(NamedTuple):
    """Where the commands run."""

    path: Path
    environment: dict[str, str]
    machine: Machine
    ollama: OllamaServer


@contextmanager
def scene(
    test: str = TRIVIAL, devices: int = 1, used: str = "2GB", **options: str
) -> Iterator[Scene]:
    """Devices of 24 GB, 22 GB free, an Ollama with a model of 10.8 GB; options as for Machine."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "project"
        path.mkdir()
        (path / "test_project.py").write_text(test)
        library = build(Path(directory)).parent
        machine = Machine.create(
            Path(directory) / "vram", [Device(total="24GB", used=used)] * devices, **options
        )
        with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}) as ollama:
            environment = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PYTEST", "CUDA", "OLLAMA", "PYTHON"))
            }
            environment.update(machine.env(library), OLLAMA_HOST=ollama.host)
            environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "64"
            yield Scene(path, environment, machine, ollama)
