"""An active run leaves the import system and the garbage collector of its process alone."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest
from simulator import Machine

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
