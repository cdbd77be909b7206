"""Plugins that many projects use, under the own scheduler and under stock xdist.

`python -m tests.benchmarks.neighbours`: outcomes, reports and results files of each plugin that is
installed, with one worker and with two; the others are named as skipped. Each runs without the
others (PYTEST_DISABLE_PLUGIN_AUTOLOAD).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

from .scene import Scene, scene

from fidelity.compare import exactly, within  # isort: skip - scene sets the path
from fidelity.runs import NEEDS, OURS, STOCK_TWICE, Run, run  # isort: skip

COMMON = """
import time
import pytest

@pytest.fixture(scope="module")
def module():
    yield
    raise RuntimeError("the module does not let go")

@pytest.fixture
def function(tmp_path):
    yield tmp_path

class TestFirst:
    @classmethod
    def teardown_class(cls):
        raise RuntimeError("the class does not let go")

    def test_one(self, function):
        pass

    def test_two(self, function):
        assert False, "no"

@pytest.mark.parametrize("i", range(4))
def test_many(i, module):
    assert i != 2

@pytest.mark.skip(reason="never")
def test_skipped():
    pass

@pytest.mark.xfail
def test_expected(function):
    assert False

def test_last(function):
    print("said")
"""


def _nothing(path: Path) -> dict[str, str]:
    return {}


def _json_report(path: Path) -> dict[str, str]:
    document = json.loads((path / "report.json").read_text())
    tests = sorted(
        [it["nodeid"], it["outcome"], *(it[w]["outcome"] for w in ("setup", "call") if w in it)]
        for it in document["tests"]
    )
    return {"report.json": json.dumps(tests), "code": str(document["exitcode"])}


def _allure(path: Path) -> dict[str, str]:
    found = []
    for file in (path / "allure").glob("*-result.json"):
        document = json.loads(file.read_text())
        parameters = [it["value"] for it in document.get("parameters", [])]
        found.append([document["fullName"], parameters, document["status"]])
    containers = len(list((path / "allure").glob("*-container.json"))) > 0
    return {"allure": json.dumps(sorted(found)), "containers": str(containers)}


def _html(path: Path) -> dict[str, str]:
    blob = re.search(r'data-jsonblob="([^"]*)"', (path / "report.html").read_text())
    assert blob, "no data in the HTML report"
    tests = json.loads(html.unescape(blob[1]))["tests"]
    rows = sorted([it["testId"], it["result"]] for each in tests.values() for it in each)
    return {"report.html": json.dumps(rows)}


def _coverage(path: Path) -> dict[str, str]:
    root = ElementTree.parse(path / "coverage.xml").getroot()
    lines = [
        f"{each.get('filename')}:{line.get('number')}:{line.get('hits')}"
        for each in root.iter("class")
        for line in each.iter("line")
    ]
    return {"coverage.xml": "\n".join(sorted(lines))}


def _reruns(path: Path) -> dict[str, str]:
    cases = ElementTree.parse(path / "junit.xml").iter("testcase")
    return {"cases": json.dumps(sorted({case.get("name", "") for case in cases}))}


class Neighbour(NamedTuple):
    """A plugin, what it is asked to do, and what it leaves."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    tests: str = COMMON
    results: Callable[[Path], dict[str, str]] = _nothing
    output: bool = True
    """Whether the output of two runs is the same, but for times."""
    needs: tuple[str, ...] = ()
    """Modules of further plugins."""
    crashes: bool = False


_BENCHMARK = """
def test_benchmark(benchmark):
    assert benchmark(sum, [1, 2]) == 3

def test_pedantic(benchmark):
    benchmark.pedantic(sum, args=([1],), rounds=2)
"""
_TIMEOUT = """
@pytest.mark.timeout(0.5)
def test_slow():
    time.sleep(5)

@pytest.mark.timeout(5)
def test_in_time():
    time.sleep(0.05)
"""
_TIMEOUT_CRASH = """
import pytest, time

@pytest.mark.parametrize("i", range(4))
def test_other(i):
    pass

@pytest.mark.timeout(0.5, method="thread")
def test_slow():
    time.sleep(5)

@pytest.mark.parametrize("i", range(4))
def test_after(i):
    pass
"""
_FLAKY = """
import pathlib

@pytest.fixture(scope="class")
def counted():
    yield

class TestFlaky:
    @pytest.mark.flaky(reruns=3)
    def test_flaky(self, counted):
        with open("tries", "a") as file:
            file.write("x")
        assert len(pathlib.Path("tries").read_text()) > 2

    def test_with_it(self, counted):
        pass
"""
_ORDER = """
import pytest

@pytest.mark.order(3)
def test_third():
    pass

@pytest.mark.order("first")
def test_first():
    pass

@pytest.mark.order(after="test_first")
def test_after():
    pass

@pytest.mark.order(-1)
def test_end():
    assert False

def test_any():
    pass
"""
_REPEAT = """
import pytest

@pytest.mark.repeat(5)
def test_repeated(tmp_path):
    pass

@pytest.fixture(scope="module")
def module():
    yield

def test_module(module):
    assert False
"""
_ASYNCIO = """
import asyncio
import pytest, pytest_asyncio

@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    yield 1
    await asyncio.sleep(0)

@pytest.mark.asyncio(loop_scope="module")
class TestServer:
    async def test_one(self, server):
        assert server == 1

    async def test_two(self, server):
        assert server == 2

@pytest.mark.asyncio
@pytest.mark.parametrize("i", range(4))
async def test_plain(i):
    await asyncio.sleep(0.01)
"""

NEIGHBOURS = (
    Neighbour(
        "pytest-benchmark", "pytest_benchmark.plugin", ("--benchmark-disable",), COMMON + _BENCHMARK
    ),
    Neighbour("pytest-benchmark, warned", "pytest_benchmark.plugin", (), COMMON + _BENCHMARK),
    Neighbour(
        "pytest-json-report",
        "pytest_jsonreport.plugin",
        ("--json-report", "--json-report-file=report.json"),
        results=_json_report,
        needs=("pytest_metadata.plugin",),
    ),
    Neighbour("allure-pytest", "allure_pytest.plugin", ("--alluredir=allure",), results=_allure),
    Neighbour(
        "pytest-rerunfailures",
        "pytest_rerunfailures",
        ("--reruns=1",),
        COMMON + _FLAKY,
        results=_reruns,
    ),
    Neighbour("pytest-timeout", "pytest_timeout", ("--timeout=10",), COMMON + _TIMEOUT),
    Neighbour(
        "pytest-timeout that ends the process", "pytest_timeout", (), _TIMEOUT_CRASH, crashes=True
    ),
    Neighbour("pytest-randomly", "pytest_randomly", ("--randomly-seed=3",)),
    Neighbour(
        "pytest-html",
        "pytest_html.plugin",
        ("--html=report.html", "--self-contained-html"),
        results=_html,
        needs=("pytest_metadata.plugin",),
    ),
    Neighbour(
        "pytest-cov",
        "pytest_cov.plugin",
        ("--cov=.", "--cov-branch", "--cov-report=xml"),
        results=_coverage,
        output=False,
    ),
    Neighbour("pytest-sugar", "pytest_sugar", ("--force-sugar",), output=False),
    Neighbour("pytest-order", "pytest_order.plugin", (), _ORDER),
    Neighbour("pytest-repeat", "pytest_repeat", ("--count=2",), _REPEAT),
    Neighbour("pytest-asyncio", "pytest_asyncio.plugin", (), _ASYNCIO),
)


def compared(neighbour: Neighbour, workers: int, here: Scene, place: Path) -> tuple[list[str], Run]:
    """What differs with this plugin and so many workers, and our run."""
    project = place / "project"
    project.mkdir(parents=True)
    tests = dedent(neighbour.tests)
    if workers > 1:
        # Which test bears the error of a wider teardown, in a results file, too, is decided by
        # the distribution.
        for line in ("the module does not let go", "the class does not let go"):
            tests = tests.replace(f'raise RuntimeError("{line}")', "pass")
    (project / "test_neighbour.py").write_text(tests)
    modules = ("xdist", "pytest_gpushare.plugin", *neighbour.needs, neighbour.module)
    arguments = [*(part for name in modules for part in ("-p", name)), *neighbour.arguments]
    arguments += ["-n", str(workers), "-p", "no:cacheprovider"]
    environment = {**here.environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def one(where: str, *more: str, order: list[str] | None = None) -> Run:
        return run(
            project,
            place / where,
            [*arguments, *more],
            environment,
            results=neighbour.results,
            order=order,
        )

    ours = one("ours", *OURS, *NEEDS)
    if not (STOCK_TWICE or ours.own_scheduler):
        return ["the own scheduler was not in charge", ours.out[-800:], ours.err[-800:]], ours
    if workers == 1:
        return exactly(one("stock"), ours, output=neighbour.output), ours
    replay = None if neighbour.crashes else lambda order: one("replay", "-n1", order=order)
    return within(lambda: one("stock"), ours, most=5, replay=replay), ours


def main() -> None:
    """Print what differs; exit code 1 where anything does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-k", default="", help="only plugins whose name has this in it")
    options = parser.parse_args()
    bad = done = 0
    with scene() as here:
        for neighbour in NEIGHBOURS:
            if options.k not in neighbour.name:
                continue
            if find_spec(neighbour.module.partition(".")[0]) is None:
                print(f"{neighbour.name}: skipped, as it is not installed")
                continue
            for workers in (1, 2):
                with tempfile.TemporaryDirectory(dir=here.path.parent) as directory:
                    found, ours = compared(neighbour, workers, here, Path(directory))
                done += 1
                bad += bool(found)
                verdict = "differs" if found else "the same"
                print(
                    f"{neighbour.name}, -n {workers}: {verdict}; {len(ours.begun)} tests, "
                    f"exit code {ours.code}",
                    flush=True,
                )
                for text in found:
                    print("  -", text.replace("\n", "\n  "), flush=True)
    print(f"{done} comparisons, {bad} with a difference")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
