"""Suites under `-W error` pass: what the plugin keeps alive stays visible to others."""

from __future__ import annotations

import pytest
from simulator import Machine
from simulator.ollama import OllamaServer

from .conftest import Project

# Hypothesis looks for who refers to the generator, and warns where it finds nobody.
REGISTERS = """
    import random
    import hypothesis

    GENERATOR = random.Random(0)

    def pytest_configure():
        hypothesis.register_random(GENERATOR)
"""

USES = """
    import conftest
    from hypothesis import given, strategies as st

    @given(st.integers())
    def test_numbers(number):
        assert 0 <= conftest.GENERATOR.random() < 1

    def test_other():
        pass
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "0")], ids=["workers", "in-process"])
def test_registered_random(project: Project, machine: Machine, arguments: tuple[str, ...]) -> None:
    with OllamaServer(machine, {}) as server:
        project.write(conftest=REGISTERS, test_project=USES)
        result = project.pytest(
            "--gpu-share", "-W", "error", *arguments,
            beside=["unraisableexception"],
            OLLAMA_HOST=server.host, PYTHONWARNINGS="error",
        )  # fmt: skip
    assert (result.code, result.passed, result.err) == (0, 2, ""), result.out
    assert "warning" not in result.out.lower()
