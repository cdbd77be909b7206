"""What a worker measures and does: peaks, what is left behind, caps, and out of memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from simulator import Device, Machine

from .conftest import Project

MB, GB = 1024**2, 1024**3

# What workers tell, as the controller hears it, in a file.
LISTEN = """
    import json
    from pytest_gpushare import plugin

    def pytest_sessionstart(session):
        started = session.config.stash.get(plugin.STARTED, None)
        if started is not None and not hasattr(session.config, "workerinput"):
            def heard(worker, told):
                with open("heard.jsonl", "a") as file:
                    print(json.dumps({"worker": worker, **told}), file=file)
            started.links.on("test", heard)
            session.config.add_cleanup(lambda: note(started))

    def note(started):
        with open("events.jsonl", "a") as file:
            for event in started.record.events():
                print(json.dumps(event._asdict()), file=file)
"""


def lines(project: Project, name: str) -> list[dict[str, Any]]:
    """What the project's conftest wrote down."""
    path = project.path / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def heard(project: Project) -> dict[str, dict[str, Any]]:
    """Test's name -> the figures that its worker sent."""
    return {told["nodeid"].rpartition("::")[2]: told for told in lines(project, "heard")}


@pytest.fixture
def two(project: Project, machine_with: Callable[..., Machine]) -> Machine:
    """24 GB, and two GPU workers of 10.5 GB each that nobody else bothers."""
    machine = machine_with(Device(total="24GB", used="2GB"))
    project.with_frameworks()
    project.write(conftest=LISTEN)
    return machine


TWO = ("--gpu-share", "--gpu-share-preset=no-ollama", "-n2")

MEASURED = """
    import gc
    import pytest
    import torch

    GB, MB = 1024**3, 1024**2
    KEPT = []

    def take(nbytes):
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    @pytest.fixture(scope="module")
    def model():
        yield take(2 * GB)

    def test_nothing():
        assert not torch.cuda.is_initialized()

    def test_peak():
        a = take(3 * GB)
        del a
        b = take(1 * GB)

    def test_after_the_peak():
        # From what the test before left in the cache.
        take(1 * GB)

    def test_with_model(model):
        take(512 * MB)

    def test_leaks(model):
        KEPT.append(take(300 * MB))

    def test_cycle(model):
        class Node: pass
        node = Node()
        node.itself, node.data = node, take(200 * MB)

    def test_fails(model):
        local = take(400 * MB)
        assert local is None

    def test_last():
        pass
"""


def test_figures(project: Project, two: Machine) -> None:
    """Peaks, what is held, and what a test leaves behind, by torch's counters."""
    project.write(test_project=MEASURED)
    result = project.pytest(*TWO[:2], "-n1")
    assert (result.passed, result.code) == (7, 1), result.out
    told = heard(project)
    assert "test_nothing" not in told
    peak = told["test_peak"]
    assert (peak["peak"], peak["exact"], peak["peak_source"]) == (3 * GB, True, "frameworks")
    assert (peak["held"], peak["left"], peak["outcome"]) == (3 * GB, 0, "passed")
    assert peak["end"] >= peak["start"] > 1e9
    after = told["test_after_the_peak"]
    assert (after["peak"], after["exact"], after["held"]) == (1 * GB, False, 3 * GB)
    # A fixture of the module is not what a test leaves behind; a global is.
    assert told["test_with_model"]["left"] == 0
    assert told["test_leaks"]["left"] == 300 * MB
    assert told["test_cycle"]["left"] == 0
    assert (told["test_fails"]["left"], told["test_fails"]["outcome"]) == (0, "failed")
    assert told["test_last"]["left"] == 0
    assert told["test_last"]["attempts"] == 1


# Two workers, each with a test that needs more than half of the device at the same time.
SHARED = """
    import pathlib, time, unittest
    import pytest
    import torch

    GB = 1024**3
    SETUPS = []

    def take(nbytes):
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def log(text, worker):
        with open("log.txt", "a") as file:
            print(text, worker, file=file)

    def both_are_here(name):
        # Each of two tests waits for the other, so that they meet on the device.
        pathlib.Path(name).touch()
        end = time.monotonic() + 20
        other = {"left": "right", "right": "left"}[name]
        while not pathlib.Path(other).exists() and time.monotonic() < end:
            time.sleep(0.01)

    @pytest.fixture(scope="module")
    def module(worker_id):
        log("module up", worker_id)
        yield
        log("module down", worker_id)

    @pytest.fixture
    def function(worker_id):
        log("function up", worker_id)
        yield
        log("function down", worker_id)
"""
HOLDER = """
    from shared import *

    def test_left(module):
        both_are_here("left")
        held = take(12 * GB)
        time.sleep(1.5)
"""


def shared(project: Project, right: str, left: str = HOLDER) -> None:
    """Two test files, one for each of two workers under loadfile."""
    project.write(shared=SHARED, test_left=left, test_right=right, test_project="")


UNCAPPED = (*TWO, "--dist=loadfile", "-o", "gpu_share_cap_vram=false", "-v")

RIGHT = """
    from shared import *

    def test_before(module):
        pass

    def test_right(module, function, record_property):
        both_are_here("right")
        time.sleep(0.5)
        print("ATTEMPT")
        held = take(11 * GB)

    def test_after(module):
        pass
"""


def test_passes_alone(project: Project, two: Machine) -> None:
    """What ran out of memory beside another runs again alone, in the same run, once."""
    shared(project, RIGHT)
    result = project.pytest(*UNCAPPED, "-rP", "-x", "--junitxml=junit.xml")
    assert (result.code, result.passed) == (0, 4), result.out
    note = re.search(r"-+ gpu-share -+\n(.*)", result.out)
    assert note is not None
    assert re.fullmatch(
        r"ran out of memory under sharing, passed alone: GPU 0 had \d\.\d+ GB of 24.0 GB free: "
        r"held by gw[01] 12\.\d+ GB, gw[01] \(its own worker\) 0.59 GB",
        note.group(1),
    ), note.group(1)
    log = (project.path / "log.txt").read_text()
    # Both attempts had a function scope of their own; the module's lived on.
    assert log.count("function up") == log.count("function down") == 2
    assert log.count("module up") == log.count("module down") == 2
    xml = (project.path / "junit.xml").read_text()
    assert 'tests="4"' in xml
    assert 'failures="0"' in xml
    assert xml.count(' name="test_right"') == 1
    assert xml.count("ran out of memory under sharing, passed alone") == 1
    told = heard(project)["test_right"]
    assert (told["attempts"], told["peak"], told["outcome"]) == (2, 11 * GB, "passed")
    kinds = [event["kind"] for event in lines(project, "events")]
    assert kinds.count("oom") == kinds.count("oom-retried") == 1
    assert two.snapshot()[0].peak_used <= 24 * GB
