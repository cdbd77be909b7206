"""What makes a start quick ends with the run, and touches no one else's imports or objects."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest
from simulator import Machine

from .conftest import Project

TWICE = dedent("""
    import gc, sys
    import pytest

    told = []

    class Look:
        def pytest_sessionfinish(self):
            import pytest_gpushare.session as room
            spec = sys.meta_path[0].find_spec("pytest_gpushare.session.start", room.__path__)
            told.append(("during", gc.get_freeze_count() > 10_000, type(spec.loader).__name__,
                         sys.meta_path[0].find_spec("test_project")))

    frozen = gc.get_freeze_count()
    for _ in range(2):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Look()])
        left = len([f for f in sys.meta_path if "gpushare" in type(f).__module__])
        told.append(("after", int(status), left, gc.get_freeze_count() <= frozen))
    for line in told:
        print(*line)
""")


@pytest.mark.parametrize(
    ("arguments", "frozen"), [(["--gpu-share"], True), (["--gpu-share", "-n", "0"], False)]
)
def test_leaves_the_process_as_it_was_found(
    project: Project, machine: Machine, arguments: list[str], frozen: bool
) -> None:
    """Two runs in one process; where it runs the tests itself, collections stay as they are."""
    del machine
    result = project.command([sys.executable, "-c", TWICE, *arguments])
    told = [line for line in result.out.splitlines() if line.startswith(("during", "after"))]
    assert told == [f"during {frozen} SourceFileLoader None", "after 0 0 True"] * 2
    assert "4 passed" in result.out
