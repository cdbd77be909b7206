"""Random machines on which a suite runs: what is advised, followed, gives what it promises.

`python -m tests.benchmarks.advised 100` tries more of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from histories.advised import follow

from .conftest import clean_environment


@pytest.mark.parametrize("seed", [*range(5), 20110])
def test_random_machine(seed: int, tmp_path: Path, nvml_library: Path) -> None:
    found = follow(seed, tmp_path / "runs", nvml_library, clean_environment())
    if found.wrong:
        pytest.fail("\n".join(found.wrong), pytrace=False)
