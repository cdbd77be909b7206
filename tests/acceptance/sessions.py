"""Sessions in the background, on one simulated machine and in one ledger."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from acceptance.conftest import Project
from inner_pytest import inner_command
from simulator.child import start_child

LARGE_TESTS = """
    import time
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(4))
    def test_large(i):
        with gpusim.alloc("4.7GB"):
            time.sleep(0.15)
"""

DECLARED = """
    import time
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(4))
    @pytest.mark.gpu(vram="6GB")
    def test_declared(i):
        with gpusim.alloc("4.7GB"):
            time.sleep(0.15)
"""

SLEEPER = """
    import pathlib, time
    import gpusim

    def test_sleeps():
        with gpusim.alloc("4GB"):
            pathlib.Path("sleeps").write_text("")
            time.sleep(600)
"""

NO_OLLAMA = ("-o", "gpu_share_preset=no-ollama", "-o", "gpu_share_min_vram_per_worker_gb=5.5")


class Session:
    """A run of pytest in the background."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process, self.path = process, path

    def finish(self, seconds: float = 90) -> str:
        """Wait for its end; returns all that it wrote."""
        try:
            self.process.wait(seconds)
        finally:
            self.kill()
        return self.path.read_text(encoding="utf-8")

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture
def start(project: Project, tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Start a session on the project's machine, in a project of its own."""
    with ExitStack() as stack:
        count = 0

        def begin(module: str, *arguments: str, conftest: str = "", **environment: str) -> Session:
            nonlocal count
            count += 1
            directory = tmp_path / f"worktree{count}"
            directory.mkdir()
            merged = {**project.environment, **environment}
            own = Project(directory, merged)
            own.environment["PYTEST_GPUSHARE_LEASES"] = merged["PYTEST_GPUSHARE_LEASES"]
            own.write(test_project=module, conftest=conftest)
            path = tmp_path / f"output{count}.txt"
            with path.open("w", encoding="utf-8") as output:
                process = start_child(
                    inner_command("--gpu-share", *arguments),
                    cwd=directory,
                    env=own.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )  # fmt: skip
            session = Session(process, path)
            stack.callback(session.kill)
            return session

        yield begin


def passed(output: str) -> int:
    match = re.search(r"(\d+) passed", output)
    return int(match.group(1)) if match else 0


def leases_directory(project: Project) -> Path:
    return Path(project.environment["PYTEST_GPUSHARE_LEASES"])


STEP = 0.01


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait until it holds; returns the seconds without those in which the machine was busy.

    That is what matters where something is to happen soon: a process that has no CPU does nothing.
    """
    until, steps = time.monotonic() + seconds, 0
    while not condition():
        assert time.monotonic() < until
        time.sleep(STEP)
        steps += 1
    return steps * STEP


def records(project: Project) -> list[dict[str, object]]:
    found = []
    for path in sorted(leases_directory(project).glob("s-*.json")):
        # A session that ends removes its record.
        with suppress(FileNotFoundError):
            text = path.read_text(encoding="ascii").strip()
            if text:
                found.append(json.loads(text))
    return found


def sizes(record: dict[str, object]) -> list[int]:
    """What a record leases of each device, in bytes."""
    devices = record["devices"]
    assert isinstance(devices, dict)
    return [[*share, 0][0] for share in devices.values()]
