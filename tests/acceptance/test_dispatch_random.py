"""Random suites, run by stock pytest and by the own dispatch; by stock xdist where they differ."""

from __future__ import annotations

import os

import pytest
from dispatching.suites import Happened, Suite, differences
from simulator import Machine

from .conftest import Project

MANY = os.environ.get("GPUSHARE_RANDOM_SUITES", "")
SEEDS = range(int(MANY)) if MANY else (0, 1, 2, 3, 4, 5, 6, 7, 21, 5186)
"""Among them are some that have set a class's fixtures up twice."""


@pytest.mark.parametrize("seed", SEEDS)
def test_as_stock(seed: int, project: Project, machine: Machine) -> None:
    """The same outcomes, fixtures set up as rarely, all torn down in order, all errors told."""
    (project.path / "test_project.py").unlink()
    suite = Suite(project.path, seed)
    suite.write()

    def happened(*arguments: str) -> Happened:
        result = project.pytest(*arguments)
        assert result.code in (0, 1), result.out
        return Happened(project.path)

    mine, alone = happened(*suite.ours), happened("-n0")
    found = differences(alone, alone, mine)
    if found:
        # What depends on the distribution is compared with a run that has one.
        found = differences(happened("-n", str(suite.gpus + suite.cpus)), alone, mine)
    assert found == []
    assert mine.outcomes
