"""Teardowns that fail or write something, told as stock pytest tells them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
from inner_pytest import inner_command
from simulator import Machine
from simulator.child import child_process, wait_for

from .conftest import Project, Result

CONFTEST = """
    import logging, os
    import pytest

    def scoped(scope):
        @pytest.fixture(scope=scope, name=f"{scope}_failing")
        def fixture(request):
            yield
            print(f"{scope} prints")
            logging.getLogger().warning(f"{scope} logs")
            raise ValueError(f"{scope} fails")
        return fixture

    for_function, for_class, for_module, for_package, for_session = map(
        scoped, ("function", "class", "module", "package", "session"))

    @pytest.fixture(scope="module")
    def module_quiet():
        yield
        print("module is quiet")

    @pytest.fixture
    def setup_fails():
        assert False, "set-up fails"
"""

# The fixtures of the last test, and how it ends: each in a module of its own.
LASTS = {
    "module": ("module_failing", "pass"),
    "module_fails": ("module_failing", "assert False, 'call fails'"),
    "module_skips": ("module_failing", "pytest.skip('not today')"),
    "module_xfails": ("module_failing", "pytest.xfail('as ever')"),
    "module_setup": ("module_failing, setup_fails", "pass"),
    "module_function": ("module_failing, function_failing", "pass"),
    "module_function_fails": ("module_failing, function_failing", "assert False, 'all fails'"),
    "quiet": ("module_quiet", "print('the test prints')"),
    "class_module": ("module_failing, class_failing", "pass"),
    "class_module_function": ("class_failing, module_failing, function_failing", "pass"),
}
LAST = """
    import pytest

    {mark}
    class TestLast:
        def test_first(self, {fixtures}):
            pass

        def test_last(self, {fixtures}):
            print("a word of the test")
            {body}
"""
UNFIXED = """
    import pytest

    {mark}
    def test_before(module_failing):
        pass

    @pytest.mark.skip(reason="by marker")
    {mark}
    def test_skipped():
        pass
"""
UNITTEST = """
    import unittest
    import pytest

    {mark}
    class TestUnit(unittest.TestCase):
        @classmethod
        def tearDownClass(cls):
            raise OSError("tearDownClass fails")

        def test_unit(self):
            pass
"""
XFAIL = """
    import pytest

    {mark}
    @pytest.mark.xfail
    def test_expected(module_failing):
        assert False
"""
END = """
    import pathlib
    import pytest

    {mark}
    def test_end():
        pathlib.Path("end").touch()
"""
# Keeps the GPU worker from helping out.
BUSY = """
    import os, pathlib, time
    import pytest

    @pytest.mark.gpu
    def test_gpu():
        until = time.monotonic() + 20
        while "PYTEST_GPUSHARE_ROLE" in os.environ and not pathlib.Path("end").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
"""
PACKAGE = """
    import pytest

    {mark}
    def test_in_package(package_failing, session_failing):
        pass
"""


@pytest.fixture(params=["gpu", "cpu"])
def kind(request: pytest.FixtureRequest, project: Project, machine: Machine) -> str:
    """A suite in which all tests are for one kind of worker."""
    (project.path / "test_project.py").unlink()
    project.write(conftest=CONFTEST)
    mark = "@pytest.mark.gpu(vram='2GB')" if request.param == "gpu" else ""
    for name, (fixtures, body) in LASTS.items():
        text = LAST.format(mark=mark, fixtures=fixtures, body=body)
        project.write(**{f"test_{name}": text})
    project.write(
        test_p_unfixed=UNFIXED.format(mark=mark),
        test_r_unittest=UNITTEST.format(mark=mark),
        test_x_expected=XFAIL.format(mark=mark),
        test_z_end=END.format(mark=mark),
    )
    package = project.path / "test_q_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("one", "two"):
        project.write(**{f"test_q_package/test_{name}": PACKAGE.format(mark=mark)})
    if request.param == "cpu":
        project.write(test_a=BUSY)
    return str(request.param)


def ours(kind: str) -> tuple[str, ...]:
    """A run with one worker for the tests of this kind."""
    beside = ("-o", "gpu_share_cpu_workers=1") if kind == "cpu" else ()
    return ("--gpu-share", "-o", "gpu_share_max_workers_per_gpu=1", *beside)


def cases(project: Project) -> Counter[str]:
    """What junit XML says of each test: one text for each element `testcase`."""
    suite = ElementTree.parse(project.path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    found = Counter(
        "\n".join([
            f"{case.attrib['classname']}::{case.attrib['name']}",
            *(f"{part.tag} {part.attrib} {known(part.text)}" for part in case),
        ])
        for case in suite
    )  # fmt: skip
    found[" ".join(suite.attrib[name] for name in ("tests", "errors", "failures", "skipped"))] += 1
    return found


def known(text: str | None) -> str:
    """A text without addresses, and without the frames of a group that are pytest's own."""
    lines = re.sub(r"0x[0-9a-f]+", "0x", text or "").splitlines()
    return "\n".join(
        line
        for line in lines
        if "Traceback" in line or not re.match(r"\s*(\+ )?[|+ ]*( {2,}|File )\S", line)
    )


def told(project: Project, result: Result) -> dict[str, object]:
    """All that is told of a run's tests."""
    cache = project.path / ".pytest_cache" / "v" / "cache" / "lastfailed"
    summary = re.findall(r"^(?:ERROR|FAILED|SKIPPED|XFAIL) .*", result.out, re.M)
    # Each process warns of the cache that is switched off and on again.
    counts = re.sub(r" in .*|, \d+ warnings?", "", result.out.splitlines()[-1]).strip("= ")
    return {
        "code": result.code,
        "counts": counts,
        "summary": sorted(summary),
        "letters": sorted("".join(re.findall(r"^([.EFsxX]+)(?: +\[|$)", result.out, re.M))),
        "junit": cases(project),
        "lastfailed": json.loads(cache.read_text()),
    }


RUN = ("-rA", "--junitxml=junit.xml", "-o", "junit_logging=all", "-p", "cacheprovider")


def both(project: Project, kind: str, *arguments: str) -> tuple[dict[str, object], ...]:
    """What is told of a run of stock xdist with one worker, and of ours."""
    stock = project.pytest("-n1", *RUN, *arguments)
    found = [told(project, stock)]
    for path in (project.path / "end", project.path / ".pytest_cache"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    mine = project.pytest(*ours(kind), *RUN, *arguments)
    assert mine.workers == {"gpu": 1, "cpu": 2}[kind], mine.out
    found.append(told(project, mine))
    return tuple(found)


def test_as_stock(kind: str, project: Project) -> None:
    """Every count, line, test case and remembered failure is as in stock xdist with one worker."""
    stock, mine = both(project, kind)
    assert mine == stock
    assert str(mine["counts"]).endswith("errors")


@pytest.mark.parametrize("kind", ["gpu"], indirect=True)
@pytest.mark.parametrize("option", ["-x", "--maxfail=4"])
def test_stops_as_stock(option: str, kind: str, project: Project) -> None:
    """An error in a module's teardown ends the run where it would have ended."""
    stock, mine = both(project, kind, option)
    assert mine == stock
    assert "errors" in str(mine["counts"]) or "1 error" in str(mine["counts"])


DEADLY = """
    import os, pathlib, signal, time
    import pytest

    @pytest.fixture(scope="module")
    def deadly():
        yield
        if not pathlib.Path("over").exists():
            pathlib.Path("over").touch()
            {body}

    {mark}
    def test_one(deadly):
        pass

    {mark}
    def test_two(deadly):
        pass
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def deadly(project: Project, kind: str, body: str, *, follow: bool) -> None:
    """A suite in whose first module something happens when it is torn down."""
    mark = "@pytest.mark.gpu(vram='2GB')" if kind == "gpu" else ""
    (project.path / "test_project.py").unlink()
    project.write(test_a=DEADLY.format(mark=mark, body=body))
    if kind == "cpu":
        # There has to be a GPU test, or nobody would be routed.
        project.write(test_gpu="import pytest\n\n@pytest.mark.gpu\ndef test_gpu():\n    pass\n")
    if follow:
        project.write(test_b=f"import pytest\n\n{mark}\ndef test_three():\n    pass\n")


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_killed_in_a_teardown(kind: str, follow: bool, project: Project, machine: Machine) -> None:
    """It is the test before that crashed, as in stock xdist; the one behind it is run."""
    deadly(project, kind, KILLED, follow=follow)
    stock = project.pytest("-n1", "--junitxml=junit.xml")
    expected = cases(project)
    (project.path / "over").unlink()
    mine = project.pytest(*ours(kind), "--junitxml=junit.xml")
    assert (mine.code, mine.passed) == (stock.code, stock.passed), mine.out
    assert cases(project) == Counter(
        {text.replace("gw0", died(mine)): n for text, n in expected.items()}
    )
    assert "crashed while running 'test_a.py::test_two'" in mine.out


def died(result: Result) -> str:
    """The worker that crashed."""
    found = re.search(r"worker '(gw\d+)' crashed", result.out)
    assert found is not None, result.out
    return found[1]


@pytest.mark.parametrize("kind", ["gpu"])
def test_interrupted_in_a_teardown(kind: str, project: Project, machine: Machine) -> None:
    """After Ctrl-C the test before is reported as what it was, once."""
    deadly(project, kind, "time.sleep(60)", follow=True)
    command = inner_command(*ours(kind), "--junitxml=junit.xml")
    with child_process(
        command, cwd=project.path, env=project.environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for((project.path / "over").exists)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2, out
    assert "2 passed" in out
    assert [text.splitlines() for text in cases(project)] == [
        ["test_a::test_one"], ["test_a::test_two"], ["2 0 0 0"],
    ]  # fmt: skip
