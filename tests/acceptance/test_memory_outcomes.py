"""What pytest makes of a test that ran out of memory: one outcome, whoever counts outcomes."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest
from simulator import Machine

from .conftest import Project
from .test_memory import RIGHT, SHARED, UNCAPPED, heard, lines, shared, two

__all__ = ["two"]

CACHED = ("-p", "cacheprovider", "-o", "cache_dir=cache", "--junitxml=junit.xml")
POOLED = (
    *("--gpu-share", "--gpu-share-preset=no-ollama"),
    *("-o", "gpu_share_max_workers_per_gpu=2", "-o", "gpu_share_cpu_workers=1"),
    *("-o", "gpu_share_cap_vram=false"),
)
"""Two GPU workers and a CPU worker, with one pool of tests."""
LAST_FAILED = "cache/v/cache/lastfailed"


def cases(project: Project) -> dict[str, list[str]]:
    """Test's name -> what junit XML has of it: one entry a test case, its elements' names."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(project.path / "junit.xml").iter("testcase"):
        what = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        found.setdefault(case.attrib["name"], []).append(" ".join(what) or "passed")
    return found


def last_failed(project: Project) -> list[str]:
    """What `--lf` would run, as pytest's cache has it."""
    path = project.path / LAST_FAILED
    return list(json.loads(path.read_text())) if path.exists() else []


def test_passed_alone_is_passed(project: Project, two: Machine) -> None:
    """One passed test case, nothing that stops the run, and `--lf` forgets an older failure."""
    shared(project, RIGHT)
    (project.path / LAST_FAILED).parent.mkdir(parents=True)
    (project.path / LAST_FAILED).write_text('{"test_right.py::TestRight::test_right": true}')
    result = project.pytest(*UNCAPPED, *CACHED, "--maxfail=1")
    assert (result.code, result.passed) == (0, 4), result.out
    assert heard(project)["test_right"]["attempts"] == 2
    names = ("test_left", "test_before", "test_right", "test_after")
    assert cases(project) == {name: ["passed"] for name in names}
    assert last_failed(project) == []


TOO_LARGE = """
    import os
    from shared import *

    @pytest.mark.gpu
    def test_left():
        both_are_here("left")
        held = take(12 * GB)
        time.sleep(1.5)

    @pytest.mark.gpu
    def test_too_large():
        both_are_here("right")
        time.sleep(0.5)
        held = take(int(os.environ["SIZE"]) * GB)

    @pytest.mark.parametrize("i", range(40))
    def test_after(i):
        time.sleep(0.25)
"""


def test_failed_alone_is_failed(project: Project, two: Machine) -> None:
    """One failed test case with the facts, at which `-x` stops; `--lf` runs that test only."""
    project.write(shared=SHARED, test_project=TOO_LARGE)
    result = project.pytest(*POOLED, *CACHED, "-x", SIZE="23")
    assert "stopping after 1 failures" in result.out, result.out
    found = cases(project)
    assert found.pop("test_too_large") == ["failure"]
    assert len(found) < 41
    assert set(map(tuple, found.values())) <= {("passed",)}
    note = "ran out of memory under sharing, failed again alone: GPU 0 had"
    assert len(re.findall(rf"-+ gpu-share -+\n{note}", result.out)) == 1
    assert note in (project.path / "junit.xml").read_text()
    assert last_failed(project) == ["test_project.py::test_too_large"]
    # It has room now.
    again = project.pytest(*POOLED, *CACHED, "--lf", SIZE="2")
    assert (again.code, again.passed) == (0, 1), again.out
    assert cases(project) == {"test_too_large": ["passed"]}
    assert last_failed(project) == []


POOL = """
    import os, signal, threading
    from shared import *

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    @pytest.fixture
    def dies():
        again = pathlib.Path("tried").exists()
        pathlib.Path("tried").touch()
        if again:
            die()
        yield
        if WHEN == "waiting":
            # The neighbour is busy for longer.
            threading.Timer(0.3, die).start()

    @pytest.mark.gpu
    def test_left(worker_id):
        log("test_left", worker_id)
        both_are_here("left")
        held = take(12 * GB)
        time.sleep(2)

    @pytest.mark.gpu
    def test_right(dies):
        both_are_here("right")
        time.sleep(0.5)
        held = take(11 * GB)

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(4))
    def test_gpu(i, worker_id):
        log(f"test_gpu[{i}]", worker_id)
        take(2 * GB)
        time.sleep(0.3)

    @pytest.mark.parametrize("i", range(8))
    def test_cpu(i, worker_id):
        log(f"test_cpu[{i}]", worker_id)
        time.sleep(0.1)
"""


@pytest.mark.parametrize("when", ["waiting", "alone"])
def test_killed_while_retried(when: str, project: Project, two: Machine) -> None:
    """In one pool with CPU tests: one test crashed, once; who rested for it goes on."""
    project.write(shared=SHARED, test_project=POOL.replace("WHEN", repr(when)))
    result = project.pytest(*POOLED, "--junitxml=junit.xml")
    assert (result.code, result.passed, result.workers) == (1, 13, 3), result.out
    assert "1 failed, 13 passed" in result.out
    crashed = r"FAILED test_project\.py::test_right"
    assert len(re.findall(crashed, result.out)) == 1
    assert re.search(r"worker 'gw\d' crashed while running '\S+::test_right'", result.out)
    gpu, cpu = [f"test_gpu[{i}]" for i in range(4)], [f"test_cpu[{i}]" for i in range(8)]
    found = cases(project)
    assert found.pop("test_right") in (["failure"], ["error"])
    assert found == {name: ["passed"] for name in ("test_left", *gpu, *cpu)}
    ran = [line.split() for line in (project.path / "log.txt").read_text().splitlines()]
    assert sorted(name for name, _ in ran) == sorted(["test_left", *gpu, *cpu])
    # The neighbour did not rest on.
    assert dict(ran)["test_left"] in {worker for name, worker in ran if name in gpu}
    events = [event["kind"] for event in lines(project, "events")]
    assert events.count("oom") == 1
    assert "oom-retried" not in events
    assert two.snapshot()[0].used == 2 * 2**30
