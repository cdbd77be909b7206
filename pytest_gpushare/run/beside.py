"""What runs beside the tests: begun, and loaded, when the workers are on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpushare.run.guarding import guard_of
from pytest_gpushare.run.started import LeftAlone, Started, name_of

if TYPE_CHECKING:
    import pytest


def begin(started: Started | LeftAlone, config: pytest.Config) -> None:
    """Start it; what fails is told and left out."""
    if not isinstance(started, Started):
        return
    if not started.gpus.simulated:
        from pytest_gpushare.run.presence import Presence

        # Lets `pytest-gpushare watch` see this session; a what-if has nothing to see.
        started.services.append(Presence(started, config.rootpath))
    started.guard = guard_of(started)
    if started.guard is not None:
        started.services.append(started.guard)
    if started.live is not None and started.plan.devices:
        from pytest_gpushare.run.watch import Watch

        uuids = [planned.device.uuid for planned in started.plan.devices]
        started.watch = Watch(
            started.live, uuids, started.crew, started.record, resident=started.resident
        )
        started.services.insert(0, started.watch)
    for service in list(started.services):
        try:
            service.start()
        except Exception as error:
            started.services.remove(service)
            started.notes.append(f"{name_of(service)} could not start: {error}")
