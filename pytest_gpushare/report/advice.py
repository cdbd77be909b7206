"""Settings that would have served this run better, computed from what it measured.

Each is tried with the real sizing rule before it is told. What NVML told a second apart are
lower bounds: they may call for more room, never for less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.planning.plan import Limit, Plan
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import RecordedTest
from pytest_gpushare.session.workers import LEAST_BY_NVML, WorkerRecord
from pytest_gpushare.units import GB, format_gb, format_number, plural

MARGIN = Fraction(115, 100)
"""What a worker is given beyond the highest peak that was counted."""

_STEP = GB // 2
_WORTH_SAVING, _WORTH_PART = 5.0, 0.1
"""Seconds, and the part of the tests' time, below which nobody would change a setting."""


class Hint(NamedTuple):
    """One sentence, with what to type."""

    text: str


def hints(run: ActiveRun) -> list[Hint]:
    """What to change; nothing where nothing is known to be better."""
    plan = run.plan
    if not plan.slots or plan.request.in_process or plan.limited_by == (Limit.HOOK,):
        return []
    members = [member for member in run.workers if member.role == "gpu"]
    if not members or run.gpus.simulated:
        return []
    found: list[Hint] = []
    # Where tests have needs of their own, a slot is no measure of what a worker may hold.
    if not run.has_needs:
        found = [*_more_room(run, members)] or [*_more_workers(run, members)]
    return [*found, *_cpu_workers(run)]


def _more_room(run: ActiveRun, members: list[WorkerRecord]) -> Iterator[Hint]:
    """A worker held more than its slot: fewer workers would have been right."""
    over = [m for m in members if m.peak is not None and m.peak.size > m.slot]
    worst = max(over, key=lambda m: m.peak.size if m.peak else 0, default=None)
    if worst is None or worst.peak is None:
        return
    need = _rounded(Fraction(worst.peak.size))
    plan = _planned(run, {"min_vram_per_worker": Fraction(need)})
    if plan is not None and plan.slots and len(plan.slots) < len(run.plan.slots):
        yield Hint(
            f"{worst.id} used {format_gb(worst.peak.size)} of VRAM, more than its slot of "
            f"{format_gb(worst.slot)}: "
            f"-o {_option('min_vram_per_worker_gb', need)} would give enough, to "
            f"{plural(len(plan.slots), 'worker')}"
        )


def _more_workers(run: ActiveRun, members: list[WorkerRecord]) -> Iterator[Hint]:
    """No worker came near its slot: more would have fitted."""
    peaks = [m.peak for m in members if m.peak is not None]
    if len(peaks) < len(members) or not all(peak.exact for peak in peaks):
        return
    highest = max(peak.size for peak in peaks)
    need = _rounded(highest * MARGIN)
    if need >= run.settings.min_vram_per_worker:
        return
    best: tuple[int, tuple[str, ...]] = (len(run.plan.slots), ())
    limits = {"max_workers_per_gb": Fraction(0), "max_workers_per_gpu": 0}
    for count in range(len(limits) + 1):
        for lifted in combinations(limits, count):
            changes = {"min_vram_per_worker": Fraction(need), **{k: limits[k] for k in lifted}}
            plan = _planned(run, changes)
            if plan is not None and len(plan.slots) > best[0]:
                best = len(plan.slots), (_option("min_vram_per_worker_gb", need),
                                         *(f"gpu_share_{key}=0" for key in lifted))  # fmt: skip
    workers, options = best
    if options and sum(run.tests.counts.values()) >= workers:
        typed = " ".join(f"-o {option}" for option in options)
        yield Hint(
            f"peak per worker was {format_gb(highest)}: {typed} would allow {workers} workers"
        )


def _cpu_workers(run: ActiveRun) -> Iterator[Hint]:
    """Most tests needed no GPU: CPU workers would have taken them."""
    plan = _planned(run, {"cpu_workers": None})
    if run.plan.cpu_workers or plan is None or not plan.cpu_workers:
        return
    tests = [test for test in run.tests if test.start is not None and test.end is not None]
    unmarked = [test for test in tests if not test.marked]
    touched = {test.nodeid: _touched(test, run) for test in unmarked}
    if not unmarked or None in touched.values():
        return
    idle = [test for test in unmarked if touched[test.nodeid] is False]
    rest = len(unmarked) - len(idle)
    idlers = {test.nodeid for test in idle}
    now = _makespan(tests, len(run.plan.slots), 0, set())
    saved = now - _makespan(tests, len(plan.slots), plan.cpu_workers, idlers)
    if saved < max(_WORTH_SAVING, _WORTH_PART * now):
        return
    others = f"with the other {rest} marked {run.settings.marker}, " if rest else ""
    yield Hint(
        f"{len(idle)} of {len(unmarked)} unmarked tests never touched the GPU: {others}"
        f"-o gpu_share_cpu_workers=auto would have saved about {_duration(saved)}"
    )


def _touched(test: RecordedTest, run: ActiveRun) -> bool | None:
    """Whether a test used the GPU; None where nobody can tell."""
    if test.touched is not None:
        return test.touched
    member = run.workers.get(test.worker)
    if member is None:
        return None
    if member.seen is None and member.kept == 0:
        return False
    # Frameworks tell only of tests beside which they were up.
    return False if any(m.counted is not None for m in run.workers) else None


def _makespan(tests: list[RecordedTest], gpus: int, cpus: int, idlers: set[str]) -> float:
    """Seconds that the tests take, each given to the worker that is free first; GPU tests first."""
    free_gpu, free_cpu = [0.0] * gpus, [0.0] * cpus
    for test in sorted(tests, key=lambda t: t.nodeid in idlers):
        lanes = free_gpu
        if test.nodeid in idlers and free_cpu and min(free_cpu) <= min(free_gpu):
            lanes = free_cpu
        at = lanes.index(min(lanes))
        lanes[at] += (test.end or 0.0) - (test.start or 0.0)
    return max([*free_gpu, *free_cpu])


def _planned(run: ActiveRun, changes: Mapping[str, object]) -> Plan | None:
    settings: Settings = replace(run.settings, **changes)  # type: ignore[arg-type]
    return None if run.replan is None else run.replan(settings)


def _rounded(size: Fraction) -> int:
    """Up to half a GB."""
    return int(-(-size // _STEP)) * _STEP


def _option(key: str, size: int) -> str:
    return f"gpu_share_{key}={format_number(Fraction(size, GB))}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


_MOST_SUSPECTS = 20


class Leak(NamedTuple):
    """What was left, and by which test."""

    size: int
    """Bytes."""
    worker: str
    source: str
    """`frameworks`: their counters around each test; `nvml`: readings a second apart."""
    suspects: tuple[str, ...]
    """Node ids: one where it is known which test it was, else the first of those that may be."""
    among: int = 1
    """How many these are."""


def leaks(run: ActiveRun) -> list[Leak]:
    """All leaks, the largest first."""
    found = [leak for member in run.workers for leak in _of(member, run)]
    return sorted(found, key=lambda leak: (-leak.size, leak.suspects))


def _of(member: WorkerRecord, run: ActiveRun) -> Iterator[Leak]:
    if member.growths.told:
        for nodeid, size in member.growths.leaks():
            yield Leak(size, member.id, "frameworks", (nodeid,))
        return
    size = (member.kept or 0) - member.context
    if size <= LEAST_BY_NVML:
        return
    # By readings a second apart nobody can tell what one test left from what the next one took:
    # any test may have done it that ended after the last reading that was low.
    suspects = [
        test.nodeid
        for test in run.tests
        if test.worker == member.id and test.end is not None and test.end >= member.low_at
    ]
    if suspects:
        yield Leak(size, member.id, "nvml", tuple(suspects[:_MOST_SUSPECTS]), len(suspects))
