"""The watch: what it reads and when; the tests and workers that its readings are laid to."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest
from simulator.child import wait_for

from pytest_gpushare.gpu.attribution import Attribution
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.session import workers
from pytest_gpushare.session.sampler import Sampler
from pytest_gpushare.session.tests import PhaseReport, RecordedTest, RecordedTests
from pytest_gpushare.session.workers import LEAST, LeftVram, Peak
from pytest_gpushare.units import GB, MB

from .scene import CONTEXT, FIRST_PID, Scene
from .test_gpu_readings import Card as Library


def test_process_lists_once_a_second_and_only_beside_workers() -> None:
    run = Scene(workers=0)
    run.tick(10)
    assert run.card.asked == 0
    run.active.workers.join("gw0", 0, 0.0)
    run.tick(1)
    # Without a PID there is nobody to look for.
    assert run.card.asked == 0
    run.active.workers.came_up("gw0", FIRST_PID)
    run.tick(10)
    assert 10 <= run.card.asked <= 11
    run.active.workers.leave("gw0", 21.0, crashed=False)
    run.tick(10)
    assert 10 <= run.card.asked <= 11
    (device,) = run.sampler.devices.values()
    assert len(device.series) == 155


def test_peaks_by_nvml_are_laid_to_the_test_that_ran() -> None:
    run = Scene()
    run.ran("t::short", 0, 0.2, holds=9)
    run.ran("t::long", 0, 3, holds=2)
    run.ran("t::other", 1, 3, holds=4)
    peaks = {test.nodeid: test.peak for test in run.finish().tests}
    # The first reading of processes came with its first sample.
    assert peaks == {
        "t::short": Peak(9 * GB, "nvml", False),
        "t::long": Peak(2 * GB, "nvml", False),
        "t::other": Peak(4 * GB, "nvml", False),
    }
    run = Scene()
    run.tick(0.2)
    run.ran("t::between_readings", 0, 0.4, holds=9)
    (test,) = run.finish().tests
    assert test.peak is None


def test_counters_know_better_than_nvml() -> None:
    """Caches of earlier tests are in NVML's figure."""
    run = Scene()
    run.ran("t::a", 0, 3, holds=5, counted={"peak": GB})
    (test,) = run.finish().tests
    assert test.peak == Peak(GB + CONTEXT, "frameworks", True)
    member = run.active.workers.get("gw0")
    assert member is not None
    # Of the worker as a whole, NVML's figure is as true, and here it is the higher one.
    assert member.peak == Peak(5 * GB, "nvml", False)


@pytest.mark.parametrize(
    "message",
    [None, 7, {}, {"nodeid": 3}, {"nodeid": "t::a", "peak": -1}, {"nodeid": "t::a", "peak": "1"},
     {"nodeid": "t::a", "peak": 2**60}, {"nodeid": "t::a", "peak": True, "left": "x", "notes": 3}],
)  # fmt: skip
def test_what_a_worker_gone_wild_tells_is_dropped(message: object) -> None:
    run = Scene()
    run.active.links.receive("gw0", ("test", message))
    run.active.links.receive("gw0", ("own", message))
    run.active.links.receive("gw0", ("here", "x"))
    run.active.links.receive("gw9", ("here", 5))
    run.ran("t::a", 0)
    (test,) = run.finish().tests
    assert (test.peak, test.left) == (None, None)


def test_what_a_worker_read_of_itself_may_come_after_its_test() -> None:
    run = Scene()
    run.ran("t::a", 0)
    run.active.links.receive("gw0", ("own", {"nodeid": "t::a", "held": 5 * GB, "at": 1.0}))
    (test,) = run.finish().tests
    assert test.peak == Peak(5 * GB, "nvml", False)


def test_a_long_test_keeps_the_highest_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_READINGS", 4)
    run = Scene()
    member = run.active.workers.get("gw0")
    assert member is not None
    for at, size in enumerate([1, 6, 2, 3, 9, 4, 5, 1]):
        run.active.workers.read(member, float(at), size * GB)
    assert len(member.readings) <= 4
    assert run.active.workers.peak_between(member, 0.0, 9.0) == Peak(9 * GB, "nvml", False)


def journal() -> RecordedTests:
    return Scene().active.tests


def reports(
    nodeid: str, *phases: tuple[str, str], at: float = 0.0, xfail: bool = False
) -> list[PhaseReport]:
    return [PhaseReport(nodeid, when, how, xfail, at, at + 1) for when, how in phases]


@pytest.mark.parametrize(
    ("phases", "xfail", "outcome"),
    [
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], False, "passed"),
        ([("setup", "passed"), ("call", "failed"), ("teardown", "passed")], False, "failed"),
        ([("setup", "failed"), ("teardown", "passed")], False, "error"),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "failed")], False, "error"),
        ([("setup", "skipped"), ("teardown", "passed")], False, "skipped"),
        ([("setup", "skipped"), ("teardown", "passed")], True, "xfailed"),
        ([("setup", "passed"), ("call", "skipped"), ("teardown", "passed")], True, "xfailed"),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], True, "xpassed"),
    ],
)
def test_outcomes_as_pytest_counts_them(
    phases: list[tuple[str, str]], xfail: bool, outcome: str
) -> None:
    found = journal()
    for report in reports("t::a", *phases, xfail=xfail):
        found.reported("gw0", report)
    assert [test.outcome for test in found] == [outcome]
    assert found.counts == {outcome: 1}


@pytest.mark.parametrize(
    "before",
    [
        [],
        [("setup", "passed")],
        [("setup", "failed")],
        [("setup", "passed"), ("call", "rerun")],
        [("setup", "passed"), ("call", "failed")],
        [("setup", "passed"), ("call", "passed"), ("teardown", "passed")],
        [("setup", "passed"), ("call", "failed"), ("teardown", "passed")],
    ],
)
@pytest.mark.parametrize("when", ["setup", "call", "teardown", "???"])
def test_a_phase_that_passed_is_taken_as_any_other(
    before: list[tuple[str, str]], when: str
) -> None:
    """By the short way, or it says that it must be told."""
    short, long = journal(), journal()
    for found in (short, long):
        for report in reports("t::a", *before):
            found.reported("gw0", report)
    (report,) = reports("t::a", (when, "passed"), at=5)
    long.reported("gw0", report)
    if not short.record_if_passed("gw0", "t::a", when, report.start, report.end, report.marked):
        short.reported("gw0", report)
    slots = [name for name in RecordedTest.__slots__ if name != "peak"]
    short_tests, long_tests = (
        [[getattr(test, name) for name in slots] for test in found] for found in (short, long)
    )
    assert short_tests == long_tests
    assert short.counts == long.counts


def test_phases_that_pass_need_no_closer_look() -> None:
    """Or the short way would be none."""
    found = journal()
    for at, when in enumerate(("setup", "call", "teardown")):
        assert found.record_if_passed("gw0", "t::a", when, at, at + 1, True)
    (test,) = found
    assert (test.outcome, test.start, test.end, test.marked) == ("passed", 0, 3, True)
    assert found.counts == {"passed": 1}


@pytest.mark.parametrize("ends", [[], [("teardown", "passed")]])
def test_of_several_attempts_the_last_counts(ends: list[tuple[str, str]]) -> None:
    """As pytest-rerunfailures reports them, with or without the failed attempt's teardown."""
    found = journal()
    for report in [
        *reports("t::a", ("setup", "passed"), ("call", "rerun"), *ends),
        *reports("t::a", ("setup", "passed"), ("call", "passed"), ("teardown", "passed"), at=5),
    ]:
        found.reported("gw0", report)
    (test,) = found
    assert (test.outcome, test.attempts, test.start, test.end) == ("passed", 2, 5, 6)


def test_a_crash_and_the_same_test_on_another_worker() -> None:
    found = journal()
    found.reported("gw0", PhaseReport("t::a", "setup", "passed", start=1, end=1.5))
    found.reported("gw0", PhaseReport("t::a", "???", "failed"))
    for report in reports("t::a", ("setup", "passed"), ("call", "passed"), ("teardown", "passed")):
        found.reported("gw1", report)
    assert [(test.worker, test.outcome) for test in found] == [
        ("gw0", "crashed"),
        ("gw1", "passed"),
    ]


def test_a_test_that_still_runs_is_told() -> None:
    """After Ctrl-C."""
    found = journal()
    found.reported("gw0", PhaseReport("t::a", "setup", "passed", start=1, end=1.5))
    assert [(test.nodeid, test.end) for test in found] == [("t::a", 1.5)]


def test_many_tests_in_little_memory() -> None:
    """Less than 300 bytes for each test: 30 MB for 100,000."""

    found = journal()
    names = [f"tests/test_module.py::test_name[{n}]" for n in range(10_000)]
    tracemalloc.start()
    for name in names:
        for when in ("setup", "call", "teardown"):
            found.reported("gw0", PhaseReport(name, when, "passed", False, 1.5, 2.5))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 3 * MB


def test_what_comes_back_is_no_leak() -> None:
    left = LeftVram()
    left.ran("t::handles", LEAST)
    left.ran("t::keeps", 2 * GB)
    left.ran("t::leaks", 1 * GB)
    left.ran("t::gives_back", -2 * GB)
    left.ran("t::gives_small_things_back", -LEAST)
    assert left.leaks() == [("t::leaks", GB)]
    left.ran("t::gives_a_part_back", -GB // 2)
    assert left.leaks() == [("t::leaks", GB // 2)]


def test_a_reader_that_hangs_adds_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a watch that is stopped stays stopped, however NVML is."""
    monkeypatch.setattr("pytest_gpushare.gpu.readings.READ_TIMEOUT", 0.05)
    monkeypatch.setattr("pytest_gpushare.session.sampler.INTERVAL", 0.01)
    run, library = Scene(), Library()
    live = LiveVram(library)
    watch = Sampler(live, Attribution(), ["GPU-0"], run.active.workers, run.active.record)
    watch.start()
    series = watch.devices["GPU-0"].series
    wait_for(lambda: len(series))
    library.hangs.clear()
    time.sleep(0.3)
    rows = len(series)
    time.sleep(0.3)
    # One reading may have been under way.
    assert 0 < len(series) <= rows + 1
    watch.stop()
    library.hangs.set()
    live.close()
    assert not any(thread.name == "gpu-share-watch" for thread in threading.enumerate())
