"""Ten of the random suites of `python -m tests.benchmarks.llm_suites`."""

from __future__ import annotations

from pathlib import Path

import pytest
from dispatching.llm_suites import LlmSuite


@pytest.mark.parametrize("seed", range(10))
def test_random_suite(seed: int, tmp_path: Path, nvml_library: Path) -> None:
    """No test is missing or begins twice, no model is used by too many at once, nothing spills."""
    assert LlmSuite(seed).check(tmp_path, nvml_library).wrong == []
