"""The ledger of a device: a reading that looks like the last one may still be news."""

from __future__ import annotations

from pytest_gpushare.plan.accounts import Ledger
from pytest_gpushare.plan.work import Reading, Room
from pytest_gpushare.units import GB


def test_same_figures_after_a_test() -> None:
    """What a fixture keeps is held by the worker, though NVML's figures have not changed."""
    ledger = Ledger(Room("GPU-0", "GPU 0", 9 * GB, context=GB))
    ledger.open("gw0")
    ledger.start("gw0", 8 * GB)
    reading = Reading(free=16 * GB, held={"gw0": 6 * GB})
    assert ledger.read(reading)
    assert not ledger.read(reading._replace())
    ledger.stop("gw0", None)
    assert ledger.retained("gw0") == 0
    assert ledger.read(reading._replace())
    assert ledger.retained("gw0") == 5 * GB
