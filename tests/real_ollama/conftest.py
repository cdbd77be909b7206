"""A real Ollama server: `ollama` on PATH, or the executable that GPUSHARE_TEST_OLLAMA names.

Without one every test here is skipped. With a Vulkan backend in the server, Mesa's llvmpipe
and Vulkan's headers, the server uses the simulated GPU; otherwise tests that need one are
skipped. GPUSHARE_TEST_OLLAMA_CACHE names a directory that keeps models and compiled kernels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from simulator import Device, Machine
from simulator.build import build_vulkan_layer

from ..acceptance.conftest import Project, machine_with, nvml_library, project
from .server import Installation, RealOllama
from .shapes import TINY, ZEROS

__all__ = ["machine_with", "nvml_library", "project"]

VARIABLE, CACHE = "GPUSHARE_TEST_OLLAMA", "GPUSHARE_TEST_OLLAMA_CACHE"

Start = Callable[..., RealOllama]


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The server under test; skips where there is none."""
    executable = os.environ.get(VARIABLE) or shutil.which("ollama")
    if not executable:
        pytest.skip(f"no Ollama server: no ollama on PATH, and {VARIABLE} is not set")
    if not os.access(executable, os.X_OK):
        pytest.fail(f"{VARIABLE} names {executable}, which cannot be executed")
    kept = os.environ.get(CACHE)
    directory = Path(kept) if kept else tmp_path_factory.mktemp("ollama")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        layer: Path | None = build_vulkan_layer(directory / "layer")
    except RuntimeError:
        layer = None  # no compiler, or no headers
    return Installation(executable, directory.absolute(), layer)


@pytest.fixture(scope="session")
def library(installation: Installation) -> Installation:
    """The server's models, made once."""
    installation.add("tiny", TINY, seed=1)
    installation.add("tiny-b", TINY, seed=2)
    for name, shape in ZEROS.items():
        installation.add(name, shape)
    return installation


@pytest.fixture
def start(library: Installation, project: Project) -> Iterator[Start]:
    """Start a server for the project, on a machine's GPU or on the CPU alone."""
    # Computing a token in software may keep the machine busy for longer than 0.5 s.
    project.file("pytest.ini", "[pytest]\ngpu_share_ollama_timeout_s = 20\n")
    # So may a load, for more than a minute.
    project.limit = 500.0
    with ExitStack() as stack:

        def started(machine: Machine | None = None, **variables: str) -> RealOllama:
            server = stack.enter_context(RealOllama(library, machine, **variables))
            if machine is not None and not server.uses_gpu:
                pytest.skip("the server sees no simulated GPU: no Vulkan backend, or no llvmpipe")
            project.environment["OLLAMA_HOST"] = server.host
            return server

        yield started


@pytest.fixture
def gpu(machine_with: Callable[..., Machine]) -> Machine:
    """A card of 8 GB, 7.5 of them free."""
    return machine_with(Device(total="8GB", used="0.5GB"))
