"""xdist's own test suite, with the own scheduler in charge of the runs inside its tests.

`python -m tests.benchmarks.xdist_suite PATH`: an unpacked source distribution of pytest-xdist. It
is run twice; the second time each inner run with `-n` is given a need for every test. The tests
whose outcome differs are printed; those in `EXPECTED` have a reason.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .scene import scene

EXPECTED = {
    "testing.acceptance_test.TestLoadScope::test_workqueue_ordered_by_size": (
        "It asserts which worker runs which scope."
    ),
    **dict.fromkeys(
        (
            "testing.acceptance_test.TestGroupScope::test_by_class",
            "testing.acceptance_test.TestGroupScope::test_by_module",
            "testing.acceptance_test.TestGroupScope::test_module_single_start",
        ),
        "With pytest 9.2, xdist 3.8 keeps no groups together (it writes them into `_nodeid`, which "
        "items have no more), so that the test fails in stock. The plugin reads the markers.",
    ),
}
"""Test -> why its outcome differs."""

PLUGIN = '''
"""Gives the inner runs of pytester the own scheduler, where they have workers."""

import os
import re
import shlex

import pytest

# The ini file is read before a hook may add to the arguments.
SETTINGS = [
    "gpu_share_preset=no-ollama", "gpu_share_vram=* = 0.5GB",
    "gpu_share_min_vram_per_worker_gb=0.5",
]
INSIDE = "XDIST_SUITE_INSIDE"


@pytest.fixture(autouse=True)
def _inside(request):
    if "pytester" in request.fixturenames:
        request.getfixturevalue("pytester")
        patch = request.getfixturevalue("monkeypatch")
        options = shlex.join(word for setting in SETTINGS for word in ("-o", setting))
        patch.setenv("PYTEST_ADDOPTS", f"-p inner_runs {options}")
        patch.setenv(INSIDE, "1")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config, args):
    words = " ".join(map(str, args))
    if os.environ.get(INSIDE) and re.search(r"(^| )(-n ?[1-9a]|--numprocesses[= ]?[1-9a])", words):
        args.insert(0, "--gpu-share")


def pytest_sessionfinish(session):
    scheduler = getattr(session.config.pluginmanager.getplugin("dsession"), "sched", None)
    if os.environ.get(INSIDE) and getattr(scheduler, "_executor", None) is not None:
        with open(os.environ["XDIST_SUITE_COUNT"], "a") as file:
            file.write("1\\n")
'''


def main() -> None:
    """Print the tests that differ; exit code 1 where one does that is not expected."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("-k", default="", help="pytest's -k")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a run")
    options = parser.parse_args()
    with scene() as here, tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "inner_runs.py").write_text(PLUGIN)
        count = Path(directory) / "count"
        outcomes = []
        for ours in (False, True):
            junit = Path(directory) / f"junit{ours}.xml"
            path = os.pathsep.join(filter(None, (here.environment["PYTHONPATH"], directory)))
            environment = {**here.environment, "PYTHONPATH": path, "XDIST_SUITE_COUNT": str(count)}
            del environment["PYTEST_XDIST_AUTO_NUM_WORKERS"]
            command = [
                *(sys.executable, "-m", "pytest", "testing", "-q", f"--junit-xml={junit}"),
                *("-p", "no:cacheprovider", "-p", "no:anyio", "-k", options.k, "--tb=short"),
                f"--basetemp={Path(directory) / f'tmp{ours}'}",
                *(("-p", "inner_runs") if ours else ()),
            ]
            done = subprocess.run(
                command, cwd=options.path, env=environment, capture_output=True, text=True,
                timeout=options.limit,
            )  # fmt: skip
            outcomes.append(_outcomes(junit))
            print(f"{'ours' if ours else 'stock'}: {done.stdout.strip().splitlines()[-1]}")
        inner = len(count.read_text().splitlines()) if count.exists() else 0
    stock, mine = outcomes
    differ = sorted(name for name in {*stock, *mine} if stock.get(name) != mine.get(name))
    unexpected = [name for name in differ if name not in EXPECTED]
    for name in differ:
        reason = EXPECTED.get(name, "NOT EXPECTED")
        print(f"{name}: {stock.get(name)} in stock, {mine.get(name)} here: {reason}")
    print(
        f"{len(stock)} tests, {inner} inner runs under the own scheduler, {len(differ)} differ, "
        f"{len(unexpected)} of them unexpectedly"
    )
    raise SystemExit(bool(unexpected) or not inner)


def _outcomes(path: Path) -> dict[str, str]:
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        inner = sorted(it.tag for it in case if it.tag in ("failure", "error", "skipped"))
        found[f"{case.get('classname')}::{case.get('name')}"] = " ".join(inner) or "passed"
    return found


if __name__ == "__main__":
    main()
