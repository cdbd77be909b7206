"""Fixtures of every scope, as stock pytest would set them up and tear them down."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from simulator import Machine

from .conftest import Project

CONFTEST = """
    import os
    import pytest

    def note(*words):
        with open("log.txt", "a") as log:
            print(os.environ.get("PYTEST_XDIST_WORKER", "main"), *words, file=log)

    def scoped(scope):
        @pytest.fixture(scope=scope, name=scope)
        def fixture(request):
            where = {"function": request.node.name, "class": request.node.name,
                     "module": request.node.name, "session": "all"}[scope]
            note("up", scope, where)
            yield
            note("down", scope, where)
            assert where not in os.environ.get("FAILING", "").split(), f"teardown of {where}"
        return fixture

    session, module, klass, function = map(scoped, ("session", "module", "class", "function"))

    @pytest.fixture(autouse=True)
    def running(request, session, module, function):
        note("test", request.node.nodeid)
"""
MODULE = """
    import time
    import pytest

    @pytest.mark.usefixtures("class")
    class Test{name}Gpu:
        @pytest.mark.gpu
        @pytest.mark.parametrize("i", range(3))
        def test_gpu(self, i):
            time.sleep(0.02)

    @pytest.mark.gpu
    def test_gpu_alone():
        pass

    @pytest.mark.usefixtures("class")
    class Test{name}Cpu:
        @pytest.mark.parametrize("i", range(6))
        def test_cpu(self, i):
            time.sleep(0.01)

    def test_cpu_alone():
        pass
"""
NAMES = ("one", "two", "three")


@pytest.fixture
def scopes(project: Project, machine: Machine) -> Project:
    """Three modules of CPU and GPU tests with fixtures of every scope."""
    (project.path / "test_project.py").unlink()
    project.write(conftest=CONFTEST)
    for name in NAMES:
        project.write(**{f"test_{name}": MODULE.format(name=name.capitalize())})
    return project


def by_worker(project: Project) -> dict[str, list[list[str]]]:
    """Worker -> what happened there, in order."""
    lines: dict[str, list[list[str]]] = defaultdict(list)
    for line in Path(project.path, "log.txt").read_text().splitlines():
        worker, *words = line.split()
        lines[worker].append(words)
    return lines


def check_nesting(lines: list[list[str]]) -> None:
    """Each fixture is set up once, ends after all that is narrower, and is there for its tests."""
    stack: list[list[str]] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for what, *words in lines:
        if what == "up":
            stack.append(words)
            seen[tuple(words)] += words[0] != "function"
        elif what == "down":
            assert stack.pop() == words, lines
        else:
            path, *names = words[0].split("::")
            assert ["session", "all"] in stack
            assert ["module", path] in stack
            assert len(names) == 1 or ["class", names[0]] in stack
    assert not stack
    assert max(seen.values()) == 1, lines


def test_scopes(scopes: Project) -> None:
    """Every scope is set up once in each worker that uses it, and all is torn down."""
    result = scopes.pytest("--gpu-share", "-o", "gpu_share_cpu_workers=2")
    assert (result.code, result.passed, result.workers) == (0, 33, 4), result.out
    lines = by_worker(scopes)
    for worker in lines.values():
        check_nesting(worker)
    assert sum(what == "test" for worker in lines.values() for what, *_ in worker) == 33


def test_failing_teardowns(scopes: Project) -> None:
    """Errors of class and module teardowns stand at the last test that ran there, as in stock."""
    failing = "test_one.py TestTwoGpu test_three.py"
    result = scopes.pytest(
        "--gpu-share",
        *("-o", "gpu_share_cpu_workers=1", "--junitxml=junit.xml"),
        FAILING=failing,
    )
    assert (result.code, result.passed, result.workers) == (1, 33, 3), result.out
    expected = set()
    for worker in by_worker(scopes).values():
        last = ""
        for what, *words in worker:
            last = words[0] if what == "test" else last
            if what == "down" and words[1] in failing.split():
                expected.add(last)
    told = re.findall(r"^ERROR (\S+)", result.out, re.M)
    assert sorted(told) == sorted(expected)
    assert f"{len(expected)} errors" in result.out
    suite = ElementTree.parse(scopes.path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["errors"] == str(len(expected))
    failed = {
        f"{case.attrib['classname']}::{case.attrib['name']}"
        for case in suite
        if case.find("error") is not None
    }
    assert failed == {
        nodeid.replace(".py::", "::").rpartition("::")[0].replace("::", ".")
        + "::"
        + nodeid.rpartition("::")[2]
        for nodeid in expected
    }
