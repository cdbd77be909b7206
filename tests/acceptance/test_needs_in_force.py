"""Needs that hold: learned ones in the next run, caps that follow them, and tests that lie."""

from __future__ import annotations

import json
import re
from typing import Any

from simulator import Machine

from .conftest import Project
from .test_memory import GB, MB, heard, lines, two

__all__ = ["two"]

CACHED = ("-p", "cacheprovider", "-o", "cache_dir=cache")
PACKED = (
    *("--gpu-share", "--gpu-share-preset=no-ollama", "--gpu-share-preset=packed", "-n4"),
    *CACHED,
)
HEAD = """
    import time
    import pytest
    import torch

    GB, MB = 1024**3, 1024**2

    def take(nbytes):
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")
"""
LEARNED = (
    HEAD
    + """
    @pytest.mark.gpu
    @pytest.mark.parametrize("size", [3, 2])
    def test_takes(size):
        take(size * GB)

    @pytest.mark.gpu
    def test_changes():
        import os
        take(int(os.environ["CHANGES"]) * GB)

    def test_plain():
        time.sleep(0.1)
"""
)


def report(project: Project) -> dict[str, dict[str, Any]]:
    """Test's name -> what the JSON report says of it."""
    document = json.loads((project.path / "report.json").read_text())
    return {test["nodeid"].rpartition("::")[2]: test for test in document["tests"]}


def test_learned(project: Project, two: Machine) -> None:
    """The second run admits by what the first one measured; a changed test is told."""
    project.write(test_project=LEARNED)
    arguments = (*PACKED, "--gpu-share-report=report.json")
    first = project.pytest(*arguments, CHANGES="2")
    assert (first.code, first.passed) == (0, 4), first.out
    found = json.loads((project.path / "cache/d/gpushare/needs.json").read_text())
    kept = found["devices"]["NVIDIA GeForce RTX 3090 Ti"]
    assert kept["test_project.py::test_takes[3]"][0] == 3 * GB
    assert kept["test_project.py::test_plain"][1] >= 0.1
    assert "learned" not in {test["need_source"] for test in report(project).values()}
    second = project.pytest(*arguments, CHANGES="4")
    assert (second.code, second.passed) == (0, 4), second.out
    told = report(project)["test_takes[3]"]
    assert told["need_source"] == "learned"
    assert told["need_bytes"] == (3 * GB + 600 * MB) * 115 // 100
    assert told["peak_bytes"] in (3 * GB, 3 * GB + 600 * MB)
    changed = [e["text"] for e in lines(project, "events") if e["kind"] == "need-changed"]
    kept_on = kept["test_project.py::test_changes"][2]
    text = "test_project.py::test_changes took 4.0 GB of VRAM, 2.0 GB when it last ran"
    assert changed == [f"{text} ({kept_on})"]
    assert f"gpu-share: {text} ({kept_on}): learned again" in second.out.splitlines()
    assert "learned again" not in first.out


LIAR = (
    HEAD
    + """
    import pathlib

    @pytest.mark.gpu(vram="4GB")
    def test_liar():
        try:
            held = take(13 * GB)
        finally:
            pathlib.Path("held").touch()
        time.sleep(2)

    @pytest.mark.gpu(vram="5GB")
    @pytest.mark.parametrize("i", range(3))
    def test_neighbour(i):
        end = time.monotonic() + 10
        while not pathlib.Path("held").exists() and time.monotonic() < end:
            time.sleep(0.01)
        held = take(4 * GB)
        time.sleep(0.5)
"""
)


def test_liar(project: Project, two: Machine) -> None:
    """One that takes three times its need is named; those that it leaves no room run again."""
    project.write(test_project=LIAR)
    result = project.pytest(*PACKED, "-o", "gpu_share_cap_vram=false")
    assert (result.code, result.passed) == (0, 4), result.out
    assert (
        "gpu-share: test_project.py::test_liar held 13.59 GB of VRAM, its need was 4.0 GB: "
        "declare vram=14GB" in result.out
    )
    again = re.findall(
        r"gpu-share: \S*test_neighbour\[\d\] ran out of VRAM .*passed alone", result.out
    )
    assert again
    assert all("test_neighbour[" in line and "13.59 GB" in line for line in again)
    assert two.snapshot()[0].peak_used <= 24 * GB


def test_capped_at_its_need(project: Project, two: Machine) -> None:
    """torch refuses the liar what its need does not cover, and its neighbours never notice."""
    project.write(test_project=LIAR)
    result = project.pytest(*PACKED)
    assert (result.code, result.passed) == (0, 4), result.out
    told = heard(project)
    assert told["test_liar"]["attempts"] == 2
    assert told["test_liar"]["need"] == 4 * GB
    assert [told[f"test_neighbour[{i}]"]["attempts"] for i in range(3)] == [1, 1, 1]
    assert told["test_neighbour[0]"]["cap"] == 5 * GB - 600 * MB
    assert re.search(r"test_liar ran out of VRAM .*; passed alone", result.out)
    assert "test_liar held 13.59 GB of VRAM, its need was 4.0 GB" in result.out


EMPTYING = (
    HEAD
    + """
    @pytest.mark.parametrize("i", range(2))
    def test_cached(i):
        take(2 * GB)

    def test_fails():
        local = take(1 * GB)
        assert local is None
"""
)


def test_empty_caches(project: Project, two: Machine) -> None:
    """`always` gives everything back after each test; `never` leaves even garbage alone."""
    project.write(test_project=EMPTYING)
    one = ("--gpu-share", "--gpu-share-preset=no-ollama", "-n1")
    project.pytest(*one, "-o", "gpu_share_empty_caches=always")
    assert [told["held"] for told in lines(project, "heard")] == [0, 0, 0]
    (project.path / "heard.jsonl").unlink()
    project.pytest(*one, "-o", "gpu_share_empty_caches=never")
    assert [told["held"] for told in lines(project, "heard")] == [2 * GB] * 3
    # What the failed test's frames hold stays with them.
    assert lines(project, "heard")[2]["left"] == 1 * GB


UNDECLARED = (
    HEAD
    + """
    import gpusim

    @pytest.mark.parametrize("i", range(16))
    def test_small(i):
        held = take(500 * MB)
        time.sleep(0.4)
"""
)


def test_packed_by_what_was_learned(project: Project, machine: Machine) -> None:
    """Tests that declare nothing: the first run takes each for a slot, the second packs them.

    9 GB: two at once of 4.5 GB, then seven of (0.5 + 0.6) GB × 1.15.
    """
    project.with_frameworks()
    project.write(test_project=UNDECLARED)
    arguments = ("--gpu-share", "--gpu-share-preset=packed", "--gpu-share-report=report.json")
    took = []
    for source in ("slot", "learned"):
        result = project.pytest(*arguments, *CACHED, PYTEST_XDIST_AUTO_NUM_WORKERS="8")
        assert (result.code, result.passed, result.workers) == (0, 16, 8), result.out
        tests = report(project).values()
        assert {test["need_source"] for test in tests} == {source}
        took.append(max(t["end_s"] for t in tests) - min(t["start_s"] for t in tests))
    # 8 rounds of 0.4 s, then 3.
    assert took[1] < 0.6 * took[0], took
    assert machine.snapshot()[0].oom_count == 0


LAST_TEST = (
    HEAD
    + """
    import pathlib

    @pytest.mark.gpu(vram="10GB")
    def test_first():
        take(9 * GB)

    @pytest.mark.gpu(vram="4GB")
    def test_second():
        take(3 * GB)
        time.sleep(1)

    @pytest.mark.gpu(vram="14GB")
    def test_last():
        take(13 * GB)
"""
)


def test_a_worker_without_tests_gives_its_vram_back(project: Project, two: Machine) -> None:
    """What its framework keeps for reuse is there for the last test of the other worker."""
    project.write(test_project=LAST_TEST)
    result = project.pytest(
        *("--gpu-share", "--gpu-share-preset=no-ollama", "-n2", "--gpu-share-report=report.json"),
        *("-o", "gpu_share_empty_caches=never"),
    )
    assert (result.code, result.passed) == (0, 3), result.out
    assert two.snapshot()[0].oom_count == 0
    assert max(test["waited_s"] for test in report(project).values()) < 8
