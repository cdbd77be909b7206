"""Random projects, run under the own scheduler and by stock xdist: nothing differs.

`python -m tests.benchmarks.fidelity 500` runs more of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fidelity.random_runs import compare
from simulator import Machine

from .conftest import Project

SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_project(seed: int, project: Project, machine: Machine, tmp_path: Path) -> None:
    compared = compare(seed, tmp_path / "case", project.environment)
    if compared.found:
        pytest.fail("\n".join([str(compared.case), *compared.found]), pytrace=False)
