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
        run = session.config.stash.get(plugin.RUN, None)
        if run is not None and not hasattr(session.config, "workerinput"):
            def heard(worker, told):
                with open("heard.jsonl", "a") as file:
                    print(json.dumps({"worker": worker, **told}), file=file)
            run.links.on("test", heard)
            session.config.add_cleanup(lambda: note(run))

    def note(run):
        with open("events.jsonl", "a") as file:
            for event in run.record.events():
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

    class TestRight:
        attempts = 0

        def test_right(self, module, function):
            self.attempts += 1
            both_are_here("right")
            time.sleep(0.5)
            held = take(11 * GB)
            assert self.attempts == 1

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


FAILING = """
    from shared import *

    def test_too_large(module, function):
        both_are_here("right")
        time.sleep(0.5)
        held = take(23 * GB)
"""


def test_fails_again(project: Project, two: Machine) -> None:
    """What does not fit alone either fails, once, and its report says who held the VRAM."""
    shared(project, FAILING)
    result = project.pytest(*UNCAPPED, "--junitxml=junit.xml")
    assert result.code == 1
    assert "1 failed, 1 passed" in result.out
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 23.00 GiB" in result.out
    note = "ran out of memory under sharing, failed again alone: GPU 0 had"
    assert len(re.findall(rf"-+ gpu-share -+\n{note}", result.out)) == 1
    assert note in (project.path / "junit.xml").read_text()
    assert any(
        line.startswith("gpu-share: test_right.py::test_too_large ran out of VRAM next to others")
        and line.endswith("; failed alone")
        for line in result.said
    )
    # Nothing of the plugin's own is between the test and its error.
    assert "retry.py" not in result.out
    assert lines(project, "events")[-1]["facts"]["outcome"] == "failed"


CORNERS = """
    from shared import *

    @pytest.fixture(scope="module")
    def large_module():
        yield take(11 * GB)

    @pytest.fixture
    def large_function():
        return take(11 * GB)

    def test_first(module):
        both_are_here("right")
        time.sleep(0.5)

    def test_module_fixture(module, large_module):
        pass

    def test_the_same_module_fixture(large_module):
        pass
"""
MORE_CORNERS = """
    from shared import *

    class TestUnittest(unittest.TestCase):
        def setUp(self):
            log("unittest up", "x")

        def test_unittest(self):
            both_are_here("right")
            time.sleep(0.5)
            held = take(11 * GB)

    @pytest.mark.xfail(raises=torch.OutOfMemoryError)
    def test_expected():
        take(30 * GB)

    def test_says_so():
        assert False, "CUDA out of memory. Tried to allocate 2.00 GiB"
"""


def test_in_fixtures(project: Project, two: Machine) -> None:
    """Out of memory in the set-up of a module's fixture, which pytest would remember."""
    shared(project, CORNERS)
    result = project.pytest(*UNCAPPED)
    assert (result.code, result.passed) == (0, 4), result.out
    told = heard(project)
    assert told["test_module_fixture"]["attempts"] == 2
    assert told["test_the_same_module_fixture"]["attempts"] == 1


def test_unittest_and_what_is_meant_to_fail(project: Project, two: Machine) -> None:
    """unittest keeps its errors to itself; xfail and assertions are nobody's to repeat."""
    shared(project, MORE_CORNERS)
    result = project.pytest(*UNCAPPED)
    assert "1 failed, 2 passed, 1 xfailed" in result.out, result.out
    told = heard(project)
    assert [told[name]["attempts"] for name in ("test_unittest", "test_expected")] == [2, 1]
    assert (project.path / "log.txt").read_text().count("unittest up") == 2
    events = [event["kind"] for event in lines(project, "events")]
    assert events.count("oom") == 1


DYING = """
    import os, signal
    from shared import *

    @pytest.fixture
    def second_time(tmp_path_factory):
        seen = pathlib.Path("seen")
        if seen.exists() and WHEN == "alone":
            os.kill(os.getpid(), signal.SIGKILL)
        seen.touch()

    def test_right(second_time, module):
        both_are_here("right")
        time.sleep(0.5)
        held = take(11 * GB)

    def test_after():
        pass
"""
KILLED = """
    import os, signal
    from shared import *

    def test_left():
        both_are_here("left")
        held = take(12 * GB)
        time.sleep(1.5)
        if WHEN == "neighbour":
            os.kill(os.getpid(), signal.SIGKILL)

    def test_left_after():
        pass
"""


@pytest.mark.parametrize("when", ["alone", "neighbour"])
def test_dies(when: str, project: Project, two: Machine) -> None:
    """A worker killed while it is alone, or while it is waited for: one test lost, none hangs."""
    shared(project, DYING.replace("WHEN", repr(when)), KILLED.replace("WHEN", repr(when)))
    # Under loadfile xdist runs the test of a crashed worker once more.
    result = project.pytest(*UNCAPPED, "--dist=load")
    assert result.code == 1, result.out
    assert "1 failed, 3 passed" in result.out, result.out
    dead = "test_right.py::test_right" if when == "alone" else "test_left.py::test_left"
    assert re.search(rf"worker 'gw\d' crashed while running '{dead}'", result.out)


NEIGHBOURS = """
    from shared import *

    def test_slow_neighbour():
        held = take(12 * GB)
        both_are_here("left")
        end = time.monotonic() + 20
        while not pathlib.Path("tried").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(2)
"""
TIMED = """
    from shared import *

    def test_before():
        both_are_here("right")

    # Either attempt takes 2.4 s, and between them the neighbour is waited for.
    @pytest.mark.timeout(4)
    def test_timed():
        time.sleep(2.4)
        pathlib.Path("tried").touch()
        held = take(11 * GB)
"""


def test_timeout_counts_each_attempt(project: Project, two: Machine) -> None:
    """pytest-timeout gives each attempt its time, and none of it goes by in waiting."""
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed here")
    shared(project, TIMED, NEIGHBOURS)
    result = project.pytest(*UNCAPPED, beside=["timeout"])
    assert (result.code, result.passed) == (0, 3), result.out
    assert heard(project)["test_timed"]["attempts"] == 2


RERUN = """
    from shared import *

    COUNT = []

    def test_flaky(module, function):
        COUNT.append(1)
        if len(COUNT) == 1:
            both_are_here("right")
            time.sleep(0.5)
            take(11 * GB)
        # Whatever else is wrong with it is for --reruns.
        assert len(COUNT) != 2
        take(11 * GB)
"""


def test_reruns(project: Project, two: Machine) -> None:
    """pytest-rerunfailures sees one failure, of the attempt alone, and runs on as ever."""
    pytest.importorskip("pytest_rerunfailures", reason="pytest-rerunfailures is not installed")
    shared(project, RERUN)
    result = project.pytest(
        *UNCAPPED, "--reruns=1", "--junitxml=junit.xml", beside=["rerunfailures"]
    )
    assert result.code == 0, result.out
    assert "2 passed, 1 rerun" in result.out
    assert 'tests="2"' in (project.path / "junit.xml").read_text()
    log = (project.path / "log.txt").read_text()
    assert log.count("function up") == log.count("function down") == 3


FORKED = """
    import os, pathlib
    import torch

    GB = 1024**3

    def test_forked():
        held = torch.empty(2 * GB, dtype=torch.uint8, device="cuda")

    def test_forked_too_large():
        held = torch.empty(30 * GB, dtype=torch.uint8, device="cuda")
"""


def test_forked(project: Project, two: Machine) -> None:
    """What a forked child measured reaches the controller with its last report."""
    pytest.importorskip("pytest_forked", reason="pytest-forked is not installed here")
    if project.pytest("--forked", "-p", "no:randomly").code:
        pytest.skip("pytest-forked does not work with this pytest")
    project.write(test_project=FORKED)
    result = project.pytest(*TWO, "--forked")
    assert "1 failed, 1 passed" in result.out, result.out
    told = heard(project)
    assert (told["test_forked"]["peak"], told["test_forked"]["outcome"]) == (2 * GB, "passed")
    assert told["test_forked_too_large"]["outcome"] == "failed"


NESTED = """
    import pytest
    import torch

    GB, MB = 1024**3, 1024**2
    KEPT = []

    def take(nbytes):
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    @pytest.fixture(scope="session")
    def weights():
        yield take(1 * GB)

    @pytest.fixture(scope="module")
    def model(request):
        yield [request.getfixturevalue("weights"), take(2 * GB)]

    @pytest.fixture(scope="class")
    def pipeline(request):
        yield [request.getfixturevalue("model"), take(512 * MB)]

    class TestPipeline:
        def test_leaks(self, request, pipeline):
            KEPT.append(take(300 * MB))

        def test_uses(self, pipeline):
            take(100 * MB)

    def test_after():
        take(100 * MB)

    def test_last():
        pass
"""


def test_fixture_that_gets_another_one(project: Project, two: Machine) -> None:
    """What a wide fixture gets by `getfixturevalue` is counted once: the real leak is named."""
    project.write(test_project=NESTED)
    result = project.pytest(*TWO[:2], "-n1", "--gpu-share-report=report.json")
    assert (result.passed, result.code) == (4, 0), result.out
    assert {name: told["left"] for name, told in heard(project).items()} == {
        "test_leaks": 300 * MB,
        "test_uses": 0,
        "test_after": 0,
        "test_last": 0,
    }
    (leak,) = json.loads((project.path / "report.json").read_text())["leaks"]
    assert leak["nodeid"] == "test_project.py::TestPipeline::test_leaks"
    assert (leak["bytes"], leak["source"]) == (300 * MB, "frameworks")
