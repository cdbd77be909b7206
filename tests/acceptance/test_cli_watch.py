"""`pytest-gpushare watch`: running sessions, in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.child import child_process, wait_for

from .conftest import Project

COMMAND = [sys.executable, "-m", "pytest_gpushare", "watch"]

HOLDING = """
    import pathlib, time
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(2))
    def test_holds(i, worker_id):
        with gpusim.alloc("1.4GB"):
            pathlib.Path(f"holds-{worker_id}").touch()
            for _ in range(600):
                if pathlib.Path("enough").exists():
                    return
                time.sleep(0.05)
"""


@pytest.fixture
def watched(project: Project, tmp_path: Path) -> Project:
    """A project whose sessions are seen by no other test."""
    project.environment["TMPDIR"] = str(tmp_path)
    project.environment["TERM"] = "xterm"
    return project


@contextmanager
def running(project: Project, *workers: str) -> Iterator[subprocess.Popen[bytes]]:
    """A session in which each of these workers holds VRAM."""
    project.write(test_project=HOLDING)
    with child_process(
        inner_command("--gpu-share", "-q", f"-n{len(workers)}"),
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as session:
        try:
            wait_for(lambda: all((project.path / f"holds-{w}").exists() for w in workers))
            yield session
        finally:
            (project.path / "enough").touch()
            session.wait(60)


def presence(project: Project) -> list[Path]:
    return sorted(Path(project.environment["PYTEST_GPUSHARE_LEASES"]).glob("s-*"))


def picture(project: Project) -> dict[str, Any]:
    result = project.command([*COMMAND, "--once", "--json"])
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert isinstance(found, dict)
    return found


def test_running_session(
    watched: Project, machine: Machine, ollama_with: Callable[..., Any]
) -> None:
    """Each worker with what it holds, in lines and as a document; gone when it has ended."""
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    with running(watched, "gw0", "gw1") as session:
        lines = watched.command([*COMMAND, "--once"])
        document = picture(watched)
    assert (lines.code, lines.err) == (0, "")
    out = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", lines.out)
    out = re.sub(r"PID \d+", "PID N", out.replace(f"session {session.pid}", "session N"))
    out = re.sub(r"workers, \d:\d\d:\d\d", "workers, TIME", out).replace(str(watched.path), "HERE")
    assert re.sub(r"127.0.0.1:\d+", "HOST", out).splitlines() == [
        "GPU 0: 16.77 GB of 24.0 GB used, 7.23 GB free; "
        "Ollama 10.8 GB, tests 3.97 GB, others 2.0 GB",
        "session N in HERE: 2 workers, TIME, leases 9.0 GB, 0 of 2 tests done",
        "gw0: GPU 0, 1.99 GB of 4.5 GB, PID N (session N)",
        "gw1: GPU 0, 1.99 GB of 4.5 GB, PID N (session N)",
        "Ollama 0.33.0 at HOST",
        "qwen2.5:14b 10.8 GB, 100 % on GPU",
    ]
    (seen,) = document["sessions"]
    assert seen["pid"] == session.pid
    assert [worker["id"] for worker in seen["workers"]] == ["gw0", "gw1"]
    assert seen["workers"][0]["held_bytes"] == int(1.4 * 2**30) + 600 * 2**20
    assert document["devices"][0]["tests_bytes"] == 2 * seen["workers"][0]["held_bytes"]
    assert document["ollama"]["models"][0]["spilled"] is False
    assert presence(watched) == []
    assert picture(watched)["sessions"] == []


def test_killed_session(watched: Project, machine: Machine) -> None:
    """SIGKILL leaves a record behind; it is not believed, and the next session removes it."""
    with running(watched, "gw0") as session:
        assert len(picture(watched)["sessions"]) == 1
        os.killpg(session.pid, signal.SIGKILL)
        session.wait(60)
        assert [path.name.split("-")[1] for path in presence(watched)] == [str(session.pid)]
        assert picture(watched)["sessions"] == []
    watched.write(test_project="def test_nothing():\n    pass\n")
    watched.pytest("--gpu-share", "-n1")
    assert presence(watched) == []


def test_without_gpu_and_ollama(watched: Project) -> None:
    """What is not there is told, and the code is 0."""
    result = watched.command([*COMMAND, "--once"])
    assert (result.code, result.err) == (0, "")
    assert "no GPU: NVML library not found" in result.out
    assert "no session" in result.out
    assert "nothing listens there" in result.out


def test_piped_until_ctrl_c(
    watched: Project, machine: Machine, ollama_with: Callable[..., Any]
) -> None:
    """A line of JSON for each picture, at once; two seconds between two questions to Ollama."""
    server = ollama_with({"qwen2.5:14b": "10.8GB"})
    with child_process(
        [*COMMAND, "--json", "--interval", "0.2"],
        cwd=watched.path,
        env=watched.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        began = time.monotonic()
        pictures = [json.loads(process.stdout.readline()) for _ in range(12)]
        took = time.monotonic() - began
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert took >= 2.1
    assert all(one["devices"][0]["total_bytes"] == 24 * 2**30 for one in pictures)
    assert pictures[-1]["ollama"]["answered"]
    assert {(request.method, request.path) for request in server.requests} == {
        ("GET", "/api/version"),
        ("GET", "/api/ps"),
    }
    rounds = [r.time for r in server.requests if r.path == "/api/ps"]
    assert all(later - earlier > 1.9 for earlier, later in pairwise(rounds))


@pytest.mark.parametrize("colour", [True, False])
def test_terminal(colour: bool, watched: Project, machine: Machine) -> None:
    """Redrawn on a screen of its own, which is left, with the cursor back, at Ctrl-C."""
    if not colour:
        watched.environment["NO_COLOR"] = "1"
    screen, code = in_terminal(
        watched, "--interval", "0.2", until=lambda text: text.count("24.0 GB used") >= 3
    )
    assert code == 0
    assert "Traceback" not in screen
    assert ("\x1b[1m" in screen) == colour
    assert screen.count("\x1b[?1049h") == screen.count("\x1b[?1049l") == 1
    assert screen.index("\x1b[?1049h") < screen.index("24.0 GB used") < screen.index("\x1b[?1049l")
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")
    assert "▒▒░" in re.sub(r"\x1b\[[0-9;]*m", "", screen)
    assert screen.rstrip().endswith(("\x1b[?1049l", "\x1b[?25h"))


def in_terminal(project: Project, *arguments: str, until: Callable[[str], bool]) -> tuple[str, int]:
    """Run watch on a terminal until its output is so, then press Ctrl-C."""
    outer, inner = pty.openpty()
    environment = {**project.environment, "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    with child_process(
        [*COMMAND, *arguments],
        cwd=project.path,
        env=environment,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    ) as process:
        os.close(inner)
        text, pressed, limit = "", False, time.monotonic() + 60
        while time.monotonic() < limit:
            if select.select([outer], [], [], 0.1)[0]:
                try:
                    text += os.read(outer, 65536).decode("utf-8", "replace")
                except OSError:
                    break
            if not pressed and until(text):
                pressed = True
                process.send_signal(signal.SIGINT)
        os.close(outer)
        assert pressed, text
        return text, process.wait(60)


@pytest.mark.parametrize("processes", ["none", "hidden-memory"])
def test_ollama_that_nvml_does_not_show_has_one_figure(
    processes: Any,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
) -> None:
    """In a container or under WSL 2: plan, samples and `watch` have what the server reports."""
    machine = machine_with(Device(total="24GB", used="2GB", processes=processes))
    ollama_with({"qwen2.5:14b": "10GB"}, load="qwen2.5:14b", machine=machine)
    project.write(test_project="import time\n\ndef test_a():\n    time.sleep(1.5)\n")
    result = project.pytest("--gpu-share", "-n", "1", "--gpu-share-report=report.json")
    assert (result.code, result.passed, result.err) == (0, 1, "")
    report = json.loads((project.path / "report.json").read_text())
    (device,) = report["devices"]
    samples = report["samples"]["devices"][device["uuid"]]
    resident = device["resident_bytes"]
    assert 10 * 2**30 <= resident < 11 * 2**30
    assert set(samples["ollama_bytes"]) == {resident}
    watched = project.command([*COMMAND, "--once", "--json"])
    (seen,) = json.loads(watched.out)["devices"]
    assert seen["ollama_bytes"] == resident
