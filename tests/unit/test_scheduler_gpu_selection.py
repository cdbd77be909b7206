"""Whether a run can have GPU tests, by what `-m` selects."""

from __future__ import annotations

import pytest

from pytest_gpushare.config.settings import Alias
from pytest_gpushare.scheduler.needs import excludes_gpu_tests

from .test_planning_sizing import DEFAULTS


@pytest.mark.parametrize(
    ("expression", "excludes"),
    [
        ("", False),
        ("gpu", False),
        ("not gpu", True),
        ("not slow", False),
        ("not gpu and not slow", True),
        ("not gpu or slow", False),
        ("not (gpu or slow)", True),
        ("slow and not(gpu)", True),
        ("not not gpu", False),
        ("slow", False),
        ("not gpu and", False),
        ("not gpu(vram='6GB')", False),
        ("not gpu-heavy", False),
    ],
)
def test_by_the_expression(expression: str, excludes: bool) -> None:
    assert excludes_gpu_tests(expression, DEFAULTS) is excludes


def test_other_markers_of_gpu_tests() -> None:
    """Aliases are markers of GPU tests too, and all tests are where one means the CPU."""
    alias = Alias("multi", (), (("devices", "2"),), "multi = devices=2")
    settings = DEFAULTS._replace(markers=(alias,))
    assert not excludes_gpu_tests("not gpu", settings)
    assert excludes_gpu_tests("not (gpu or multi)", settings)
    cpu = DEFAULTS._replace(markers=(Alias("host", (), (("cpu", ""),), "host = cpu"),))
    assert not excludes_gpu_tests("not gpu and not host", cpu)
