"""Random runs whose true history of VRAM is known: what is printed of it is right.

`python -m tests.benchmarks.figures 300` runs more of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from histories.checking import check_seed, in_words

from .conftest import clean_environment


@pytest.mark.parametrize("seed", [*range(10), 20080])
def test_random_history(seed: int, tmp_path: Path, nvml_library: Path) -> None:
    checked = check_seed(seed, tmp_path / "case", nvml_library, clean_environment())
    if checked.wrong:
        pytest.fail("\n".join([*in_words(checked), checked.output]), pytrace=False)
