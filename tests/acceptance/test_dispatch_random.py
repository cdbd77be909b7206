"""Random suites, run by stock pytest, by stock xdist, and by the plugin's own dispatch."""

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
    found = []
    for arguments in (("-n", str(suite.gpus + suite.cpus)), ("-n0",), suite.ours):
        result = project.pytest(*arguments)
        assert result.code in (0, 1), result.out
        found.append(Happened(project.path))
    assert differences(*found) == []
    assert found[0].outcomes
