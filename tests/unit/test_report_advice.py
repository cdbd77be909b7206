"""Hints: computed from what was measured, tried with the real sizing rule, or not given."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from pytest_gpushare.planning.plan import Limit, Request
from pytest_gpushare.report.results import Results
from pytest_gpushare.units import GB

from .scene import CONTEXT, Scene

NO_LIMITS = {"max_workers_per_gb": Fraction(0), "max_workers_per_gpu": 0}


def hints(run: Scene) -> list[str]:
    return [advice.text for advice in Results(run.finish()).assessment.advice]


def counted(run: Scene, *sizes: float) -> Scene:
    """Tests that hold so many GB by the frameworks' counters, on the workers in turn."""
    for at, size in enumerate(sizes):
        run.ran(f"t::{at}", at % 2, counted={"peak": int(size * GB) - CONTEXT})
    return run


def test_more_workers() -> None:
    """The issue's own example; what is typed gives what is promised."""
    run = counted(Scene(workers=2, request=Request(number=2), **NO_LIMITS), 2.1, 2.0)
    assert hints(run) == []
    run = counted(Scene(workers=2, **{**NO_LIMITS, "max_workers_per_gpu": 2}), 2.1, 2.0, 1.0)
    (hint,) = hints(run)
    assert hint == (
        "peak per worker was 2.1 GB: -o gpu_share_min_vram_per_worker_gb=2.5 "
        "-o gpu_share_max_workers_per_gpu=0 would allow 3 workers"
    )


def test_only_the_need_stands_in_the_way() -> None:
    run = Scene(workers=3, **NO_LIMITS)
    for at in range(4):
        run.ran(f"t::{at}", at % 3, counted={"peak": int(2.1 * GB) - CONTEXT})
    assert hints(run) == []
    run = Scene(workers=1, min_vram_per_worker=Fraction(9 * GB), **NO_LIMITS)
    for at in range(4):
        run.ran(f"t::{at}", 0, counted={"peak": int(2.1 * GB) - CONTEXT})
    assert hints(run) == [
        "peak per worker was 2.1 GB: -o gpu_share_min_vram_per_worker_gb=2.5 would allow 3 workers"
    ]


def test_lower_bounds_never_ask_for_less() -> None:
    """Neither readings of NVML nor counters that are not sure."""
    run = Scene(workers=2)
    for at in range(4):
        run.ran(f"t::{at}", at % 2, 3, holds=1.0)
    assert hints(run) == []
    run = Scene(workers=2)
    for at in range(4):
        run.ran(f"t::{at}", at % 2, counted={"peak": GB, "exact": False})
    assert hints(run) == []


def test_lower_bounds_may_ask_for_more() -> None:
    run = Scene(workers=2)
    run.ran("t::large", 1, 3, holds=5.2)
    assert hints(run) == [
        "gw1 used at least 5.2 GB of VRAM, more than its slot of 4.5 GB: "
        "-o gpu_share_min_vram_per_worker_gb=5.5 would give enough, to 1 worker"
    ]


def test_more_than_the_budget() -> None:
    """9.86 GB where 9.0 are there for tests: said, with the reservation beside which it fits."""
    run = Scene(workers=2)
    run.ran("t::large", 1, 3, holds=9.86)
    found = Results(run.finish()).assessment
    assert found.shortages == (
        "gw1 held at least 9.86 GB of VRAM, more than the 9.0 GB that all tests of its GPU may "
        "hold",
    )
    (advice,) = found.advice
    assert advice.settings == (
        "gpu_share_min_vram_per_worker_gb=10 gpu_share_ollama_vram_reservation_mb=11264"
    )


def test_declared_needs() -> None:
    """6 GB in a slot of 4.5 GB as declared is no fault; 9 GB declared as 3 is one, by name."""
    run = Scene(workers=2)
    run.active.tests.need("t::declared", 6 * GB, "marker")
    run.ran("t::declared", 0, 3, holds=5.9)
    assert Results(run.finish()).assessment == ((), (), ())
    run = Scene(workers=2)
    run.active.tests.need("t::liar", 3 * GB, "marker")
    run.ran("t::liar", 0, 3, holds=8.8)
    (advice,) = Results(run.finish()).assessment.needs
    assert advice.text == (
        "t::liar held at least 8.8 GB of VRAM, its need was 3.0 GB: declare vram=9GB"
    )
    assert hints(run) == []


def test_no_hint_that_could_not_be_followed() -> None:
    """More than a device has; a hook that decides; a run without workers."""
    run = Scene(workers=2)
    run.ran("t::larger_than_all", 1, 3, holds=21.5)
    assert hints(run) == []
    run = counted(Scene(workers=2), 1.0, 1.0, 1.0, 1.0)
    run.active.plan = replace(run.active.plan, limited_by=(Limit.HOOK,))
    assert hints(run) == []
    run = counted(Scene(workers=1, request=Request(in_process=True)), 1.0)
    assert hints(run) == []


def test_cpu_workers() -> None:
    """38 of 40 unmarked tests were up to no GPU: the estimate is of their own durations."""
    run = Scene(workers=2, cpus=8)
    for at in range(40):
        idle = at not in (7, 8)
        run.ran(f"t::{at}", at % 2, 3.0, counted={"peak": 4 * GB - CONTEXT, "idle": idle})
    # Two workers took 40 times 3 s: 60 s each. Two GPU tests and 38 others on 8 workers: 15 s.
    assert hints(run) == [
        "38 of 40 unmarked tests never touched the GPU: with the other 2 marked gpu "
        "and -o gpu_share_cpu_workers=auto would have saved about 45 s"
    ]


@pytest.mark.parametrize("case", ["unknown", "short", "all touch", "-n2"])
def test_no_cpu_workers_without_cause(case: str) -> None:
    """And none where the command line leaves no worker for them."""
    run = Scene(workers=2, cpus=8, request=Request(number=2) if case == "-n2" else None)
    run.card.silent = case == "unknown"
    for at in range(10):
        known = {"peak": 4 * GB - CONTEXT, "idle": case != "all touch"}
        seconds = 0.2 if case == "short" else 3.0
        run.ran(f"t::{at}", at % 2, seconds, counted=None if case == "unknown" else known)
    assert hints(run) == []
