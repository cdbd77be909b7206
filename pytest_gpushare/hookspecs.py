"""Hooks for other plugins and conftests: more devices, and changes of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_gpushare.gpu.devices import Device
    from pytest_gpushare.planning.plan import Plan


@pytest.hookspec
def pytest_gpushare_devices(config: pytest.Config) -> Sequence[Device]:  # type: ignore[empty-body]
    """More devices than those that NVML lists, such as GPUs of other vendors.

    Called once, in the controller, when the run asked for the plugin. A device names the
    environment variable by which its workers see it (`Device.variable`) and what to write
    there (`Device.visible_as`). Sizes are bytes. All implementations are called.
    """


@pytest.hookspec(firstresult=True)
def pytest_gpushare_plan(config: pytest.Config, plan: Plan) -> Plan | None:
    """Change the plan before any worker starts; None leaves it as it is.

    The first implementation that returns a plan decides. It may take slots away, change
    their sizes, or add slots on devices of the plan; `dataclasses.replace` makes the new one.
    """
