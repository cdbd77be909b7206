"""Runs and commands in a terminal: colours, and lines that are broken at words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from emulated import run, shown
from inner_pytest import inner_command
from simulator import Machine

from .conftest import Project
from .test_plan_table import card

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

COMMAND = [sys.executable, "-m", "pytest_gpushare"]


@pytest.fixture
def seated(project: Project) -> Project:
    """A project whose user sits at a terminal."""
    project.environment["TERM"] = "xterm-256color"
    return project


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_run(
    columns: int,
    seated: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
) -> None:
    """No line of the plugin is longer than the terminal, and each starts where a line of it may."""
    machine_with(card("24GB", "11.2GB"), card("48GB", "40GB"))
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    code, terminal = run(
        inner_command("--gpu-share", "-vv"), seated.path, seated.environment, (columns, 24)
    )
    assert code == 0
    rows = shown(terminal.parts, (columns, 24))
    began = next(at for at, row in enumerate(rows) if row.startswith("gpu-share: "))
    said = []
    for row in rows[began:]:
        if not row.startswith(("gpu-share: ", "  ")):
            break
        said.append(row)
    assert len(said) > 8
    assert any(row.startswith("    ") for row in said) == (columns < 120) or columns == 120
    # A word that the terminal had to break would go on in the first column.
    assert all(len(row) <= columns for row in said)
    text = re.sub(r"\s+", " ", " ".join(said))
    assert "VRAM of GPU 0: Ollama reservation" in text
    assert "\x1b[32mgpu-share: Ollama kept qwen2.5:14b on the GPU" in terminal.written


def test_colours_of_a_fallback(seated: Project, machine_with: Callable[..., Machine]) -> None:
    """A problem is yellow, in each of its lines."""
    machine_with(card("10GB", "9.5GB"))
    seated.environment["OLLAMA_HOST"] = "127.0.0.1:9"
    code, terminal = run(
        inner_command("--gpu-share", "-n2"), seated.path, seated.environment, (60, 24)
    )
    assert code == 0
    found = re.findall(r"\x1b\[33m([^\x1b]*)\x1b\[0m", terminal.written)
    assert " ".join(" ".join(found).split()).startswith(
        "gpu-share: 2 CPU workers (insufficient VRAM per worker: 0.0 GB usable, 3.0 GB needed; "
        "gpu_share_min_vram_per_worker_gb)"
    )


@pytest.mark.parametrize("command", ["plan", "doctor"])
@pytest.mark.parametrize("columns", [60, 120])
def test_commands(
    command: str, columns: int, seated: Project, machine_with: Callable[..., Machine]
) -> None:
    """plan and doctor are in colour and broken at words; not with NO_COLOR."""
    machine_with(card("10GB", "9.5GB"))
    _, terminal = run([*COMMAND, command], seated.path, seated.environment, (columns, 40))
    assert "\x1b[" in terminal.written
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.written)
    for line in plain.splitlines():
        assert len(line) <= columns or len(line.split()) <= 2, line
    environment = {**seated.environment, "NO_COLOR": "1"}
    _, terminal = run([*COMMAND, command], seated.path, environment, (columns, 40))
    assert "\x1b[" not in terminal.written


def test_gpu_tests_without_a_gpu(seated: Project, machine_with: Callable[..., Machine]) -> None:
    """The last line of the plugin: how many, why, and what to change."""
    machine_with(card("16GB", "14GB"))
    seated.write(
        test_project="""
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(3))
            def test_gpu(i, gpu_share):
                if i == 2:
                    pytest.skip("no GPU here")
                assert gpu_share.role == "gpu"

            def test_cpu():
                pass
        """
    )
    result = seated.pytest("--gpu-share", "-n2")
    assert result.code == 1
    last = result.said[-1]
    assert last.startswith(
        "gpu-share: 2 GPU tests failed and 1 was skipped on CPU workers, which see no GPU "
        "(insufficient VRAM per worker: 1.0 GB usable, 3.0 GB needed"
    )
    assert "): -o gpu_share_" in last or "): if no Ollama is to run here, -o " in last
    quiet = seated.pytest("--gpu-share", "-n2", "-q")
    assert len(quiet.said) == 1
