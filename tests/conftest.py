"""What all tests share."""

from __future__ import annotations

import socket

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept `timeout` of pyproject.toml where pytest-timeout is missing, as tests/gpu allows."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "the limit of a test; without pytest-timeout there is none")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let a worker's pytest-rerunfailures send what it asks the controller before each test.

    With `--reruns` TCP holds the second of two short messages back until the first is
    acknowledged: 40 ms a test.
    """
    connection = getattr(getattr(config, "failures_db", None), "sock", None)
    if connection is not None and hasattr(config, "workerinput"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
