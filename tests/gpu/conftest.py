"""Checks on a real GPU: each runs pytest, or Python, in a process of its own.

`GPUSHARE_GPU_RESULTS` names a file to which each check's result is appended as a line of
JSON; `run.py` makes a table of it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .card import MB, SIMULATED, Card, NoCardError, environment, find_card, plugin_arguments

LEAST = 5 * 1024 * MB
"""Bytes that must be free: two workers of 1.5 GB, the safety buffer, and something to spare."""

QUIET = (
    *("--gpu-share", "--gpu-share-preset=no-ollama"),
    *("-o", "gpu_share_ollama_gpu=none", "-o", "gpu_share_min_vram_per_worker_gb=1.5"),
)


def pytest_configure() -> None:
    """Refuse the simulated library: what passes on it says nothing of a GPU."""
    if os.environ.get("GPUSHARE_SIM_STATE"):
        raise pytest.UsageError(SIMULATED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Append the check's result to the file that `run.py` named."""
    report = yield
    path = os.environ.get("GPUSHARE_GPU_RESULTS")
    if path and (report.when == "call" or report.outcome != "passed"):
        line = {
            "check": (_docstring(item) or item.name).split("\n")[0].rstrip("."),
            "name": item.name,
            "outcome": report.outcome,
            "reason": _reason(report),
            "figures": [text for key, text in item.user_properties if key == "figure"],
        }
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)
    return report


def _reason(report: pytest.TestReport) -> str:
    """Why it was skipped, or the first line of how it failed."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).splitlines()[0][:200] if crash else ""


def _docstring(item: pytest.Item) -> str:
    return getattr(item, "function", None).__doc__ or ""


@dataclass(frozen=True)
class Result:
    """How a checked process ended, and what it noted."""

    code: int
    text: str
    """All that it printed."""
    notes: list[dict[str, Any]]

    @property
    def note(self) -> dict[str, Any]:
        """The only note."""
        assert len(self.notes) == 1, self.text
        return self.notes[0]

    def passed(self) -> Result:
        """This result, if the process ended well."""
        if self.code:
            why = [line[2:].strip() for line in self.text.splitlines() if line.startswith("E  ")]
            pytest.fail(f"{why[0] if why else f'exit code {self.code}'}\n{self.text}")
        return self


class Project:
    """A directory with one test file, and the ways to run it on the card."""

    def __init__(self, path: Path, card: Card) -> None:
        self.path = path
        self.card = card
        shutil.copy(Path(__file__).with_name("inside.py"), path)
        # A configuration of its own, so that none of a directory above counts.
        (path / "pytest.ini").write_text("[pytest]\n")

    def pytest(
        self, test: str, *arguments: str, quiet: tuple[str, ...] = QUIET, **changes: str
    ) -> Result:
        """Run this test file under the plugin; `changes` are environment variables."""
        (self.path / "test_inside.py").write_text(textwrap.dedent(test))
        options = ["-p", "no:cacheprovider", *plugin_arguments(), *quiet, *arguments]
        return self._run(["-m", "pytest", *options], changes)

    def python(self, code: str) -> Result:
        """Run this code without pytest."""
        (self.path / "script.py").write_text(textwrap.dedent(code))
        return self._run(["script.py"], {})

    def _run(self, arguments: list[str], changes: dict[str, str]) -> Result:
        notes = self.path / "notes.jsonl"
        notes.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.path,
            env=environment(**{"CUDA_VISIBLE_DEVICES": self.card.uuid, **changes}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=300,
            check=False,
        )
        lines = notes.read_text().splitlines() if notes.exists() else []
        return Result(done.returncode, done.stdout, [json.loads(line) for line in lines])


@pytest.fixture(scope="session")
def card() -> Card:
    """The GPU; skips where there is none, or none with room."""
    try:
        found = find_card()
    except NoCardError as error:
        pytest.skip(str(error))
    if found.free < LEAST:
        pytest.skip(f"{found.name}: {found.free // MB} MB free, {LEAST // MB} MB needed")
    if not found.shared:
        pytest.skip(f"{found.name}: its compute mode lets one process in at most")
    return found


@pytest.fixture
def project(tmp_path: Path, card: Card) -> Project:
    """A project of its own for each check."""
    return Project(tmp_path, card)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Put a figure into the table that `run.py` prints."""
    return lambda text: record_property("figure", text)


_SEES_A_GPU = {
    "torch": "import torch; raise SystemExit(not torch.cuda.is_available())",
    "jax": "import jax; raise SystemExit(jax.default_backend() != 'gpu')",
    "cupy": "import cupy; raise SystemExit(not cupy.cuda.runtime.getDeviceCount())",
    "tensorflow": "import tensorflow as tf; "
    "raise SystemExit(not tf.config.list_physical_devices('GPU'))",
}


def needs(module: str) -> None:
    """Skip the check where a framework is not installed, or sees no GPU even without us."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if not _sees_a_gpu(module):
        pytest.skip(f"{module} is installed, but sees no GPU even without the plugin")


@functools.cache
def _sees_a_gpu(module: str) -> bool:
    command = [sys.executable, "-c", _SEES_A_GPU[module]]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=300)
    return done.returncode == 0


def bare(uuid: str) -> str:
    """A UUID without `GPU-` or `MIG-`, as CUDA tells it."""
    return uuid.partition("-")[2]
