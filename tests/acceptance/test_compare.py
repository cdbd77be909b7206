"""`pytest-gpushare compare`: the reports of two real runs."""

from __future__ import annotations

import json
import sys

from simulator import Machine

from .conftest import Project

COMMAND = [sys.executable, "-m", "pytest_gpushare", "compare"]

TESTS = """
    import pathlib
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(2))
    def test_holds(i):
        with gpusim.alloc("1.4GB"):
            pass

    def test_changes():
        assert not pathlib.Path("later").exists()
"""


def test_two_runs(project: Project, machine: Machine) -> None:
    """Outcomes, settings and workers that differ; the page; and JSON."""
    project.write(test_project=TESTS)
    assert project.pytest("--gpu-share", "--gpu-share-report", "a.json").code == 0
    project.file("later", "")
    options = ("--gpu-share-report", "b.json", "-o", "gpu_share_safety_buffer_mb=2048")
    assert project.pytest("--gpu-share", "-n1", *options).code == 1
    result = project.command([*COMMAND, "a.json", "b.json", "-o", "difference.html"])
    assert (result.code, result.err) == (0, "")
    rows = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "GPU workers 2 → 1" in rows
    assert "failed 0 → 1 +1" in rows
    assert "test_project.py::test_changes passed → failed" in rows
    assert "gpu_share_safety_buffer_mb 1024 → 2048" in rows
    assert "GPU 0 usable for tests 9.0 GB → 8.0 GB -1.0 GB" in rows
    page = (project.path / "difference.html").read_text(encoding="utf-8")
    assert "Two runs compared" in page
    assert "<script" not in page
    found = json.loads(project.command([*COMMAND, "a.json", "b.json", "--json"]).out)
    assert [section["title"] for section in found["sections"]][:2] == ["Run", "VRAM"]


def test_what_is_no_report(project: Project) -> None:
    """One line, and exit code 4."""
    project.file("a.json", "{}")
    result = project.command([*COMMAND, "a.json", "nothing.json"])
    assert result.code == 4
    assert result.err.startswith("ERROR: a.json: is no report")
    assert len(result.err.splitlines()) == 1
