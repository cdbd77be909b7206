"""Everything that doctor looks at, gathered once and with a limit of time for each part."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pytest_gpushare.cli.bounded import bounded
from pytest_gpushare.cli.doctor.pytest_view import PytestView, ask
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.plan.model import Request
from pytest_gpushare.probe.facts import OllamaFacts
from pytest_gpushare.run.others import Others
from pytest_gpushare.run.preloading import check
from pytest_gpushare.run.start import Host, start
from pytest_gpushare.run.started import Started
from pytest_gpushare.settings.load import Written, load
from pytest_gpushare.settings.values import Settings

_PACKAGES = ("pytest", "pytest-xdist", "execnet", "nvidia-ml-py", "httpx", "pynvml", "rich")
_TOOLS = ("torch", "vllm", "deepspeed")
_PATIENCE = 5.0
"""Seconds for an Ollama that did not answer in the time that a run gives it."""
_NVML_PATIENCE = 10.0


@dataclass(frozen=True)
class NvmlVersions:
    """What the library says of itself; None where it does not."""

    nvml: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """Where this process runs."""

    system: str = ""
    python: str = ""
    is_wsl: bool = False
    is_container: bool = False
    wsl_library: bool = False
    """Whether WSL's own libnvidia-ml is where WSL puts it."""


@dataclass(frozen=True)
class Examined:
    """The facts."""

    environment: Mapping[str, str]
    where: Surroundings
    packages: Mapping[str, str]
    """Distribution -> version, of those that are installed."""
    pynvml_is_foreign: bool
    """Whether the module `pynvml` is not the one of nvidia-ml-py."""
    pytest: PytestView
    settings: Settings
    settings_error: str
    started: Started
    start_error: str
    """Why a run with these settings would not start."""
    nvml: NvmlVersions = field(default_factory=NvmlVersions)
    patient_ollama: OllamaFacts | None = None
    """What Ollama said when it was given more time; None where that was not needed."""
    overwriting: Sequence[str] = ()
    """`conftest.py:3` for each conftest that sets CUDA_VISIBLE_DEVICES."""


def examine(arguments: Sequence[str]) -> Examined:
    """Look at everything; `arguments` are for pytest."""
    environment = dict(os.environ)
    view = ask(arguments)
    settings, settings_error = settings_of(view)
    request = Request() if view.request.in_process else view.request
    host = Host((), view.cpus or os.cpu_count() or 1, environment)
    started, start_error = _start(settings, request, host)
    return Examined(
        environment=environment,
        where=_surroundings(),
        packages=_versions((*_PACKAGES, *_TOOLS)),
        pynvml_is_foreign=_pynvml_is_foreign(),
        pytest=view,
        settings=settings,
        settings_error=settings_error,
        started=started,
        start_error=start_error,
        nvml=bounded(_nvml_versions, _NVML_PATIENCE) or NvmlVersions()
        if started.gpus.driver
        else NvmlVersions(),
        patient_ollama=_ask_patiently(started),
        overwriting=_overwriting(Path(view.root) if view.root else Path.cwd()),
    )


def settings_of(view: PytestView) -> tuple[Settings, str]:
    """The settings in force, and what is wrong with them; then the defaults stand in."""
    error = view.wrong_switch
    if view.written is not None:
        try:
            return load(view.written), error
        except GpuShareError as refused:
            error = error or str(refused)
    return load(_nothing_written()), error


def _start(settings: Settings, request: Request, host: Host) -> tuple[Started, str]:
    """The plan of a run; one that would not start is planned for with what may be."""
    # Whoever only looks loads no model.
    lenient = replace(settings, fallback_to_cpu_when_constrained=True, ollama_preload=False)
    error = ""
    try:
        if settings.ollama_preload:
            check(settings)
        started = start(lenient, request, host, Others())
    except GpuShareError as refused:
        error = str(refused)
        sure = replace(lenient, ollama_unreachable="reserve", ollama_gpu=("auto",))
        started = start(sure, request, host, Others())
    started.close()
    return started, error


def _nothing_written() -> Written:
    here = Path()
    # No JSON file either.
    return Written({}, {"gpu_share_config": ""}, {}, "", here, here, here)


def _ask_patiently(started: Started) -> OllamaFacts | None:
    ollama = started.ollama
    address = ollama.server
    if ollama.answered or address is None or "no answer" not in ollama.problem:
        return None
    from pytest_gpushare.probe.ollama import ask as ask_ollama

    return bounded(lambda: ask_ollama(address, _PATIENCE), _PATIENCE + 0.5)


def _nvml_versions() -> NvmlVersions:
    from pytest_gpushare.probe.nvml import Nvml

    nvml = Nvml()
    nvml.open()
    try:
        return NvmlVersions(*nvml.versions())
    finally:
        nvml.close()


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = str(metadata.version(name))
        except Exception:
            # Not installed, or its metadata is broken: either way nothing is known of it.
            continue
    return found


def _pynvml_is_foreign() -> bool:
    """Whether `import pynvml` finds a package; nvidia-ml-py has a single module."""
    try:
        spec = find_spec("pynvml")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.submodule_search_locations is not None


def _surroundings() -> Surroundings:
    release = platform.release().lower()
    return Surroundings(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        is_wsl="microsoft" in release,
        is_container=any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
        or bool(os.environ.get("KUBERNETES_SERVICE_HOST")),
        wsl_library=Path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists(),
    )


def _overwriting(root: Path) -> Sequence[str]:
    from pytest_gpushare.cli.doctor.conftests import overwriting

    return bounded(lambda: overwriting(root), 5.0) or ()


def executable() -> str:
    """How this Python is called in a command for the user."""
    name = Path(sys.executable).name
    return name if re.fullmatch(r"python[0-9.]*(\.exe)?", name) else "python"
