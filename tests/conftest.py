"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept `timeout` of pyproject.toml where pytest-timeout is missing, as tests/gpu allows."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "the limit of a test; without pytest-timeout there is none")
