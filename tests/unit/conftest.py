"""What all unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from pytest_gpushare.worker.memory import own_children

# An example takes as long as a busy machine lets it: that is no failure.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """A process that one test leaves is seen by others as theirs."""
    before = own_children()
    yield
    assert own_children() <= before, "the test left a process"
