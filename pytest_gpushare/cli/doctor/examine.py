"""The facts that doctor checks, gathered once, each part with a time limit; and its findings."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pytest_gpushare.cli.plan_command import PytestView, pytest_view, settings_of
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.vendors import variables
from pytest_gpushare.host_probe import host_probe
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.place import culprit
from pytest_gpushare.planning.leasing import Terms
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.planning.preloading import check
from pytest_gpushare.planning.startup import PlanHooks
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start import Host, start
from pytest_gpushare.text import one_line
from pytest_gpushare.timed import call_within


class Level(str, Enum):
    """How bad a finding is; the values are the marks that are printed."""

    OK = "ok"
    LOOK = "!"
    """The run works, but something needs a look, or can go wrong later."""
    BROKEN = "x"


@dataclass(frozen=True)
class Finding:
    """One line of doctor, with the fix where something is wrong."""

    level: Level
    fact: str
    code: str = ""
    """The name of its section in the documentation; empty for an [ok]."""
    fix: str = ""
    """The command or the setting that fixes it."""


class Section(NamedTuple):
    """The findings about one subject."""

    title: str
    findings: tuple[Finding, ...]


def ok(fact: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(Level.OK, safe(fact))


def look(code: str, fact: str, fix: str) -> Finding:
    """A finding that needs a look."""
    return Finding(Level.LOOK, safe(fact), code, safe(fix))


def broken(code: str, fact: str, fix: str) -> Finding:
    """A finding of something broken: doctor's exit code is 1."""
    return Finding(Level.BROKEN, safe(fact), code, safe(fix))


def safe(text: str) -> str:
    """Foreign text on one line, without the passwords and query values of URLs."""
    text = re.sub(r"://[^/\s@]*@", "://***@", text)
    text = re.sub(r"([?&][^=\s&]{1,40}=)[^\s&]+", r"\1***", text)
    return one_line(text, 600)


_MOST_SECONDS = 3.0
_SKIPPED = {"node_modules", "site-packages", "__pycache__", "build", "dist"}


def overwriting(root: Path) -> list[str]:
    """The lines of conftests that set CUDA_VISIBLE_DEVICES, as `tests/conftest.py:12`.

    The search ends after `_MOST_SECONDS`.
    """
    found, until = [], time.monotonic() + _MOST_SECONDS
    for folder, folders, files in os.walk(root):
        if time.monotonic() > until:
            break
        # Sorted: file systems list directories in different orders.
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED
            and not name.startswith(".")
            and not Path(folder, name, "pyvenv.cfg").exists()
        )
        if "conftest.py" in files:
            found.append(culprit(variables(), [str(Path(folder, "conftest.py"))]))
    return list(filter(None, found))


_PACKAGES = ("pytest", "pytest-xdist", "execnet", "nvidia-ml-py", "httpx", "pynvml")
_TOOLS = ("torch", "vllm", "deepspeed")
_PATIENCE = 5.0
"""Seconds for an Ollama that did not answer within the time limit of a run."""
_DRIVER_PATIENCE = 10.0


@dataclass(frozen=True)
class Platform:
    """The system that this process runs on."""

    system: str = ""
    python: str = ""
    is_wsl: bool = False
    is_container: bool = False
    wsl_library: bool = False
    """Whether libnvidia-ml is where WSL installs it."""


@dataclass(frozen=True)
class Examined:
    """All facts that the checks use."""

    environment: Mapping[str, str]
    where: Platform
    packages: Mapping[str, str]
    """Distribution -> version, of those that are installed."""
    pynvml_is_foreign: bool
    """Whether the module `pynvml` is not the one of nvidia-ml-py."""
    pytest: PytestView
    settings: Settings
    settings_error: str
    started: ActiveRun
    start_error: str
    """Why a run with these settings would not start."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What the driver's library says of itself: name -> version."""
    patient_ollama: OllamaFacts | None = None
    """Ollama's answer with a longer time limit; None where that was not needed."""
    overwriting: Sequence[str] = ()
    """`conftest.py:3` for each conftest that sets CUDA_VISIBLE_DEVICES."""


def find_facts(arguments: Sequence[str]) -> Examined:
    """Gather the facts; `arguments` are passed to pytest."""
    environment = dict(os.environ)
    view = pytest_view(arguments)
    settings, settings_error = settings_of(view)
    request = Request() if view.request.in_process else view.request
    host = Host((), view.cpus or os.cpu_count() or 1, environment)
    run, start_error = _start(settings, request, host)
    root = Path(view.root) if view.root else Path.cwd()
    return Examined(
        environment=environment,
        where=_surroundings(),
        packages=_versions((*_PACKAGES, *_TOOLS)),
        pynvml_is_foreign=_pynvml_is_foreign(),
        pytest=view,
        settings=settings,
        settings_error=settings_error,
        started=run,
        start_error=start_error,
        versions=(run.gpus.driver and call_within(_DRIVER_PATIENCE, _versions_of_driver)) or {},
        patient_ollama=_ask_patiently(run),
        overwriting=call_within(5.0, lambda: overwriting(root)) or (),
    )


def _start(settings: Settings, request: Request, host: Host) -> tuple[ActiveRun, str]:
    """The plan of a run, and why it would not start; the plan is then made without that limit."""
    # doctor never loads a model.
    lenient = settings._replace(fallback_to_cpu_when_constrained=True, ollama_preload=False)
    terms = Terms(Path.cwd(), only_asks=True)
    error = ""
    try:
        if settings.ollama_preload:
            check(settings)
        facts = start(lenient, request, host, PlanHooks(), terms=terms)
    except GpuShareError as refused:
        error = str(refused)
        sure = lenient._replace(ollama_unreachable="reserve", ollama_gpu=("auto",))
        facts = start(sure, request, host, PlanHooks(), terms=terms)
    facts.close()
    return ActiveRun(facts), error


def _ask_patiently(run: ActiveRun) -> OllamaFacts | None:
    ollama = run.ollama
    address = ollama.server
    if ollama.answered or address is None or "no answer" not in ollama.problem:
        return None
    from pytest_gpushare.ollama.catalog import ask as ask_ollama

    return call_within(_PATIENCE + 0.5, lambda: ask_ollama(address, _PATIENCE))


def _versions_of_driver() -> Mapping[str, str]:
    probe = host_probe()
    probe.open()
    try:
        return probe.versions()
    finally:
        probe.close()


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = str(metadata.version(name))
        except Exception:
            # Not installed, or its metadata is broken: its version is unknown.
            continue
    return found


def _pynvml_is_foreign() -> bool:
    """Whether `import pynvml` finds a package; nvidia-ml-py has a single module."""
    spec = find_spec("pynvml")
    return spec is not None and spec.submodule_search_locations is not None


def _surroundings() -> Platform:
    release = platform.release().lower()
    return Platform(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        is_wsl="microsoft" in release,
        is_container=any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
        or bool(os.environ.get("KUBERNETES_SERVICE_HOST")),
        wsl_library=Path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists(),
    )


def executable() -> str:
    """The name of this Python in a command for the user."""
    name = Path(sys.executable).name
    return name if re.fullmatch(r"python[0-9.]*(\.exe)?", name) else "python"
