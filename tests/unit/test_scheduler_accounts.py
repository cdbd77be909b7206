"""The ledger of a device: a reading that looks like the last one may still be news."""

from __future__ import annotations

from random import Random

from pytest_gpushare.scheduler.accounts import DeviceLedger
from pytest_gpushare.scheduler.types import DeviceCapacity, DeviceReading
from pytest_gpushare.units import GB


def test_same_figures_after_a_test() -> None:
    """What a fixture keeps is held by the worker, though NVML's figures have not changed."""
    ledger = DeviceLedger(DeviceCapacity("GPU-0", "GPU 0", 9 * GB, context=GB))
    ledger.open("gw0")
    ledger.start("gw0", 8 * GB)
    reading = DeviceReading(free=16 * GB, held={"gw0": 6 * GB})
    assert ledger.read(reading)
    assert not ledger.read(reading._replace())
    ledger.stop("gw0", None)
    assert ledger.retained(GB) == []
    assert ledger.read(reading._replace())
    assert ledger.retained(GB) == [(5 * GB, "gw0")]


def test_nothing_held_is_believed_where_figures_were_told() -> None:
    """0 bytes for all is what containers report, who never report anything else."""
    ledger = DeviceLedger(DeviceCapacity("GPU-0", "GPU 0", 9 * GB, context=GB))
    for worker in ("gw0", "gw1"):
        ledger.open(worker)
        ledger.start(worker, 2 * GB)
        ledger.stop(worker, None)
    ledger.read(DeviceReading(free=9 * GB, held={"gw0": 0, "gw1": 0}))
    assert ledger.limit_by_budget("gw0") == 8 * GB
    ledger.read(DeviceReading(free=8 * GB, held={"gw0": GB, "gw1": 0}))
    assert ledger.limit_by_budget("gw0") == 9 * GB
    ledger.read(DeviceReading(free=9 * GB, held={"gw0": 0, "gw1": 0}))
    assert ledger.limit_by_budget("gw1") == 9 * GB


def test_the_sums_are_those_of_the_accounts() -> None:
    """Whatever happened: tests, readings, emptied caches, a worker that went."""
    draw = Random(1)
    ledger = DeviceLedger(DeviceCapacity("GPU-0", "GPU 0", 24 * GB, 0, GB, 25 * GB, context=GB))
    workers = [f"gw{number}" for number in range(5)]
    for _ in range(2000):
        worker = draw.choice(workers)
        if worker not in ledger.accounts:
            ledger.open(worker)
        elif worker not in ledger.running:
            draw.choice(
                [
                    lambda w: ledger.start(w, draw.randrange(8) * GB),
                    lambda w: ledger.emptied(w, draw.choice([None, 0, GB])),
                    ledger.close,
                ]
            )(worker)
        elif draw.random() < 0.2:
            ledger.keep_ahead(worker, draw.randrange(8) * GB)
        elif draw.random() < 0.8:
            ledger.stop(worker, draw.choice([None, 0, 2 * GB]))
        else:
            ledger.close(worker)
        held = {w: draw.choice([None, draw.randrange(9) * GB]) for w in workers}
        ledger.read(DeviceReading(draw.choice([None, draw.randrange(25) * GB]), None, held))
        accounts = ledger.accounts.values()
        assert ledger.present == sum(
            one.held if one.by_nvml is None else one.by_nvml for one in accounts
        )
        assert ledger.committed == sum(one.committed for one in accounts)
        assert ledger.beyond == sum(
            one.ahead if one.by_nvml is None else max(0, one.ahead - one.outstanding)
            for one in accounts
        )
        assert ledger.outstanding == sum(max(0, one.need - one.present) for one in accounts)
        assert ledger.running == {w: a for w, a in ledger.accounts.items() if a.running}
        for one in ledger.accounts:
            limits = [ledger.limit_by_budget(one), ledger.limit_by_free_vram(one)]
            assert ledger.limit(one) == min(limit for limit in limits if limit is not None)


def test_what_the_next_test_takes_while_the_running_one_ends() -> None:
    """Its VRAM was free when it was sent: no other worker gets it, though the budget has room."""
    ledger = DeviceLedger(DeviceCapacity("GPU-0", "GPU 0", 21 * GB, 0, GB, 22 * GB, context=0))
    for worker in ("gw0", "gw1"):
        ledger.open(worker)
    ledger.start("gw0", 10 * GB)
    ledger.read(DeviceReading(12 * GB, None, {"gw0": 10 * GB, "gw1": 0}))
    assert (ledger.limit("gw0"), ledger.limit("gw1")) == (21 * GB, 11 * GB)
    ledger.keep_ahead("gw0", 8 * GB)
    assert (ledger.limit("gw0"), ledger.limit("gw1")) == (21 * GB, 3 * GB)
    assert (ledger.limit_by_budget("gw1"), ledger.limit_by_free_vram("gw1")) == (11 * GB, 3 * GB)
    # Its call has given all back: what is outstanding is what the next test takes.
    ledger.read(DeviceReading(22 * GB, None, {"gw0": 0, "gw1": 0}))
    assert (ledger.limit("gw0"), ledger.limit("gw1")) == (21 * GB, 11 * GB)
    # Where no process is named nobody knows that.
    ledger.read(DeviceReading(22 * GB, None, {"gw0": None, "gw1": None}))
    assert ledger.limit("gw1") == 3 * GB
    ledger.close("gw0")
    ledger.read(DeviceReading(22 * GB, None, {"gw1": 0}))
    assert ledger.limit("gw1") == 21 * GB


def test_what_a_child_left_behind_holds_is_not_free_for_the_next_test() -> None:
    """5 GB of it on a card with 4 GB left: while it lives, no more than those 4 GB can be had."""
    ledger = DeviceLedger(DeviceCapacity("GPU-0", "GPU 0", 9 * GB, context=GB))
    ledger.open("gw0")
    ledger.start("gw0", 6 * GB)
    reading = DeviceReading(free=4 * GB, held={"gw0": 5 * GB}, left_behind={"gw0": 5 * GB})
    ledger.read(reading)
    # The running test may have started it for itself.
    assert ledger.accounts["gw0"].left_behind == 0
    ledger.stop("gw0", None)
    ledger.read(reading._replace())
    assert (ledger.accounts["gw0"].left_behind, ledger.has_left_behind) == (5 * GB, True)
    assert ledger.limit("gw0") == 4 * GB
    # It goes on for a part of the next test.
    ledger.start("gw0", 2 * GB)
    ledger.read(DeviceReading(free=8 * GB, held={"gw0": GB}))
    assert (ledger.accounts["gw0"].left_behind, ledger.has_left_behind) == (0, False)
    ledger.stop("gw0", 0)
    ledger.read(DeviceReading(free=9 * GB, held={"gw0": 0}))
    assert ledger.limit("gw0") == 9 * GB
