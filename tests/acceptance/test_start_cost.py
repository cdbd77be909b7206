"""An active run imports what it needs, and leaves the import system and the collector alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from textwrap import dedent

import pytest
from simulator import Device, Machine

from .conftest import Project

TWICE = dedent("""
    import gc, sys
    import pytest

    def state():
        finders = [f for f in sys.meta_path if "gpushare" in getattr(f, "__module__", "")]
        return len(finders), gc.get_freeze_count() - frozen, gc.isenabled()

    frozen, seen = gc.get_freeze_count(), []

    class Look:
        def pytest_sessionfinish(self):
            seen.append(("during", *state()))

    for _ in range(2):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Look()])
        seen.append(("after", int(status), *state()))
    for line in seen:
        print(*line)
""")


@pytest.mark.parametrize("arguments", [["--gpu-share"], ["--gpu-share", "-n", "0"]])
def test_leaves_the_process_as_it_was_found(
    project: Project, machine: Machine, arguments: list[str]
) -> None:
    """Two runs in one process: no finder of ours, nothing hidden from `gc.get_referrers`."""
    del machine
    result = project.command([sys.executable, "-c", TWICE, *arguments])
    seen = [line for line in result.out.splitlines() if line.startswith(("during", "after"))]
    assert seen == ["during 0 0 True", "after 0 0 0 True"] * 2
    assert "4 passed" in result.out


def test_a_run_on_this_host_imports_nothing_of_others(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Neither an idle run, nor an active one with a report, nor a worker knows of other hosts."""
    machine_with(Device(total="24GB"))
    project.file(
        "conftest.py",
        """
        import os
        import sys

        def pytest_unconfigure():
            found = [name for name in sys.modules if "gpushare" in name and "hosts" in name]
            with open(f"imported-{os.getpid()}", "w") as file:
                file.write(" ".join(found))
        """,
    )
    for arguments in ([], ["--gpu-share", "-n", "1", "--gpu-share-report=r.html"]):
        assert project.pytest(*arguments).passed == 4
    found = [path.read_text() for path in project.path.glob("imported-*")]
    assert found == ["", "", ""]
