"""Advice: what to change, for the terminal, the page, the step summary, doctor and watch.

Every suggestion of a setting is planned again before it is offered, and offered only where the
plan gives what the suggestion promises. Where no change helps, the facts are stated instead.
Peaks that NVML shows once a second are lower bounds: they may call for more VRAM, never for less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from pytest_gpushare.gpu.attribution import OTHERS
from pytest_gpushare.planning.plan import Limit, shortage
from pytest_gpushare.report.candidates import (
    LEAST_RESERVATION,
    STEP,
    Advice,
    Case,
    case_of,
    checked,
    idle_devices,
    more_room,
    reservation_for,
)
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import RecordedTest
from pytest_gpushare.session.workers import Peak, WorkerRecord
from pytest_gpushare.text import printable
from pytest_gpushare.units import GB, MB, at_least, format_gb, plural

_HEADROOM = Fraction(115, 100)
"""What a worker is given beyond the highest peak that was counted."""
_OVER = Fraction(105, 100)
"""A test counts as over its need from here on: figures of one moment are read one by one."""
_WORTH_SAVING, _WORTH_PART = 5.0, 0.1
"""Seconds, and the part of the tests' time, below which nobody would change a setting."""
_MOST_TESTS = 3
"""Tests that are named, of each kind."""


class Assessment(NamedTuple):
    """What lacked, and what to change."""

    shortages: tuple[str, ...] = ()
    """What lack of VRAM caused, one sentence each."""
    advice: tuple[Advice, ...] = ()
    """The best first."""
    needs: tuple[Advice, ...] = ()
    """Tests whose declared needs are too small."""


def assess(run: ActiveRun, over: Sequence[OverNeed]) -> Assessment:
    """What lacked in a run, and what to change."""
    if run.gpus.simulated or run.plan.request.in_process:
        return Assessment()
    case = case_of(run)
    members = [record for record in run.workers if record.role == "gpu"]
    shortages = [*_shortage_of_gpus(run), *_out_of_memory(run), *_over(run, members)]
    advice: list[Advice] = []
    if case is not None and run.plan.limited_by != (Limit.HOOK,):
        if not run.plan.slots:
            if any(test.marked for test in run.tests) or gpu_tests_without_gpu(run):
                advice += more_room(case)
        elif members:
            advice += idle_devices(case)
            if not admits_by_needs(run):
                advice += _larger_slots(case, members) or _more_workers(run, case, members)
            advice += _too_large(run, case)
            advice += _cpu_workers(run, case)
    advice += _skip(run)
    advice += _wait_for_others(run)
    advice += _declare_what_passed_alone(run, over)
    return Assessment(tuple(shortages), tuple(advice), tuple(declared_too_small(run, over)))


def admits_by_needs(run: ActiveRun) -> bool:
    """Whether tests are admitted by needs of their own, so that a slot is no measure."""
    return run.has_needs or run.tests.has_own_needs


class WithoutGpu(NamedTuple):
    """GPU tests that no GPU worker ran."""

    failed: int
    skipped: int
    text: str
    """How many, and why."""


def gpu_tests_without_gpu(run: ActiveRun) -> WithoutGpu | None:
    """GPU tests that failed or were skipped since there is no GPU worker; None: there are none.

    Where no test is marked any may need a GPU: those that failed count if the VRAM was short.
    """
    if run.plan.slots:
        return None
    outcomes = [test.outcome for test in run.tests if test.marked]
    noun, skipped = "GPU test", outcomes.count("skipped")
    if not outcomes and not run.plan.absence:
        noun, outcomes = "test", [test.outcome for test in run.tests]
    failed = sum(map(_FAILED.count, outcomes))
    if not failed and not skipped:
        return None
    in_process = run.plan.request.in_process
    where = "in this process, which sees no GPU" if in_process else _ON_CPU_WORKERS
    what = f"{plural(failed, noun)} failed" if failed else ""
    if failed and skipped:
        what += f" and {skipped} {'was' if skipped == 1 else 'were'} skipped"
    elif skipped:
        what = f"{plural(skipped, noun)} {'was' if skipped == 1 else 'were'} skipped"
    return WithoutGpu(failed, skipped, f"{what} {where} ({shortage(run.plan)})")


_ON_CPU_WORKERS = "on CPU workers, which see no GPU"
_FAILED = ("failed", "error", "crashed")


def _shortage_of_gpus(run: ActiveRun) -> Iterator[str]:
    """As one of the shortages: where a device is there and has no room."""
    found = gpu_tests_without_gpu(run)
    if found is not None and found.failed and not run.plan.absence:
        yield found.text


def _skip(run: ActiveRun) -> list[Advice]:
    """Where GPU tests fail for lack of a GPU: the setting that skips them."""
    if run.plan.slots or run.settings.without_gpu != "run":
        return []
    failed = [t for t in run.tests if t.marked and t.outcome in ("failed", "error")]
    if not failed:
        return []
    changes = {"without_gpu": "skip"}
    return [Advice(f"{plural(len(failed), 'GPU test')} failed without a GPU",
                   "would skip such tests", changes)]  # fmt: skip


def _out_of_memory(run: ActiveRun) -> Iterator[str]:
    found = {event.facts["nodeid"] for event in run.record.events("oom")}
    if found:
        yield f"{plural(len(found), 'test')} ran out of VRAM"


def _over(run: ActiveRun, members: Sequence[WorkerRecord]) -> Iterator[str]:
    """Workers and tests that held more than all the tests of their device may hold."""
    budgets = {d.device.uuid: d.reach for d in run.plan.devices}
    for record in members:
        peak, budget = record.peak, budgets.get(record.device or "", 0)
        if peak is not None and peak.size > budget * _OVER:
            yield (
                f"{record.id} held {amount(peak)} of VRAM, more than the {format_gb(budget)} that "
                "all tests of its GPU may hold"
            )


def _larger_slots(case: Case, members: Sequence[WorkerRecord]) -> list[Advice]:
    """A worker held more than its slot: fewer workers, or a smaller reservation."""
    over = [(m.peak, m) for m in members if m.peak is not None and m.peak.size > m.slot]
    if not over:
        return []
    peak, worst = max(over, key=lambda each: each[0].size)
    need = _rounded(Fraction(peak.size))
    why = f"{worst.id} used {amount(peak)} of VRAM, more than its slot of {format_gb(worst.slot)}"
    changes: dict[str, object] = {"min_vram_per_worker": Fraction(need)}
    plan = case.planned(changes)
    fitting = reservation_for(case, need)
    least = max(case.models, LEAST_RESERVATION)
    if not plan.slots and fitting is not None and fitting >= least:
        changes["ollama_vram_reservation"] = Fraction(fitting)
        plan = case.planned(changes)
    slots = plan.slots
    if not slots or slots == case.plan.slots or min(slot.vram for slot in slots) < need:
        return []
    gives = f"would give enough, to {plural(len(slots), 'worker')}"
    return [Advice(why, gives, changes, workers=len(slots), slot=need)]


def _more_workers(run: ActiveRun, case: Case, members: Sequence[WorkerRecord]) -> list[Advice]:
    """No worker came near its slot: more would have fitted."""
    peaks = [m.peak for m in members if m.peak is not None]
    if len(peaks) < len(members) or not all(peak.exact for peak in peaks):
        return []
    highest = max(peak.size for peak in peaks)
    need = _rounded(highest * _HEADROOM)
    if need >= case.settings.min_vram_per_worker:
        return []
    best = Advice("", "", workers=len(case.plan.slots))
    limits: dict[str, object] = {"max_workers_per_gb": Fraction(0), "max_workers_per_gpu": 0}
    for count in range(len(limits) + 1):
        for lifted in combinations(limits, count):
            changes = {"min_vram_per_worker": Fraction(need), **{k: limits[k] for k in lifted}}
            plan = case.planned(changes)
            if len(plan.slots) > best.workers:
                why = f"peak per worker was {format_gb(highest)}"
                gives = f"would allow {len(plan.slots)} workers"
                best = Advice(why, gives, changes, workers=len(plan.slots), slot=need)
    return [best] if best.changes and sum(run.tests.counts.values()) >= best.workers else []


def _too_large(run: ActiveRun, case: Case) -> list[Advice]:
    """The models that the run relies on need much less than is reserved."""
    fixed = case.settings.ollama_vram_reservation
    if case.plan.demand is None or not case.plan.demand.asked or fixed is None:
        return []
    wanted = -(-case.models // (512 * MB)) * 512 * MB
    if not wanted or wanted + GB > fixed:
        return []
    why = f"Ollama's models need {format_gb(case.models)}, {format_gb(fixed)} are reserved"
    found = checked(case, why, {"ollama_vram_reservation": Fraction(wanted)}, case.least_slot)
    return found if sum(run.tests.counts.values()) >= sum(a.workers for a in found) else []


def _cpu_workers(run: ActiveRun, case: Case) -> list[Advice]:
    """Most tests needed no GPU: CPU workers would have taken them."""
    plan = case.planned({"cpu_workers": None})
    if run.plan.cpu_workers or not plan.cpu_workers:
        return []
    tests = [test for test in run.tests if test.start is not None and test.end is not None]
    unmarked = [test for test in tests if not test.marked]
    touched = {test.nodeid: _touched(test, run) for test in unmarked}
    if not unmarked or None in touched.values():
        return []
    idle = {test.nodeid for test in unmarked if touched[test.nodeid] is False}
    rest = len(unmarked) - len(idle)
    now = _makespan(tests, len(run.plan.slots), 0, set())
    saved = now - _makespan(tests, len(plan.slots), plan.cpu_workers, idle)
    if saved < max(_WORTH_SAVING, _WORTH_PART * now):
        return []
    others = f"with the other {rest} marked {run.settings.marker} and" if rest else ""
    return [
        Advice(
            f"{len(idle)} of {len(unmarked)} unmarked tests never touched the GPU",
            f"would have saved about {_duration(saved)}",
            {"cpu_workers": None},
            others,
            len(plan.slots),
        )
    ]


class OverNeed(NamedTuple):
    """A test that held more than the need that is declared for it."""

    nodeid: str
    peak: Peak
    need: int
    """Bytes."""


def over_need(run: ActiveRun) -> list[OverNeed]:
    """Tests that held more than their declared needs, the largest first."""
    found, needs = [], run.tests.needs
    for test in run.tests:
        need, source = needs.get(test.nodeid, (0, ""))
        declared = need if source in ("marker", "rule") else 0
        if declared and test.peak is not None and test.peak.size > declared * _OVER:
            found.append(OverNeed(test.nodeid, test.peak, declared))
    return sorted(found, key=lambda each: -each.peak.size)


def declared_too_small(run: ActiveRun, over: Sequence[OverNeed]) -> Iterator[Advice]:
    """What to declare for such tests."""
    for nodeid, peak, need in over:
        size = _rounded(Fraction(peak.size))
        fits = size <= run.plan.usable
        yield Advice(
            f"{printable(nodeid)} held {amount(peak)} of VRAM, its need was {format_gb(need)}",
            "" if fits else f"is needed, and {format_gb(run.plan.usable)} are there for tests",
            action=f"declare vram={size / GB:g}GB" if fits else f"{size / GB:g} GB",
        )


def _wait_for_others(run: ActiveRun) -> Iterator[Advice]:
    """Tests ran out of VRAM that other processes took, and xdist scheduled them."""
    if run.differences is not None:
        return
    before = max((u.remainder or 0 for u in run.attribution.start.values()), default=0)
    taken = [e for e in run.record.events("oom") if e.facts["held"].get(OTHERS, 0) > before + GB]
    slot = min((slot.vram for slot in run.plan.slots), default=0) // STEP * STEP
    if taken and slot:
        yield Advice(
            f"{plural(len(taken), 'test')} ran out of VRAM that other processes took, "
            "and did not wait for it, having no need",
            "would let them wait",
            action=f'-o "gpu_share_vram=* = {slot / GB:g}GB"',
        )


def _declare_what_passed_alone(run: ActiveRun, over: Sequence[OverNeed]) -> Iterator[Advice]:
    """Tests that ran out of memory beside others and passed alone: what to declare."""
    again = {e.facts["nodeid"]: e.facts["outcome"] for e in run.record.events("oom-retried")}
    if not again:
        return
    named = {each.nodeid for each in over}
    peaks = {test.nodeid: test.peak for test in run.tests if test.nodeid in again}
    for nodeid in list(again)[:_MOST_TESTS]:
        peak = peaks.get(nodeid)
        if nodeid in named or again[nodeid] != "passed" or peak is None:
            continue
        size = _rounded(Fraction(peak.size))
        if size <= run.plan.usable:
            yield Advice(
                f"{printable(nodeid)} ran out of VRAM next to others and passed alone",
                "would keep that much for it from the start",
                action=f'declare @pytest.mark.{run.settings.marker}(vram="{size / GB:g}GB")',
            )


def amount(peak: Peak) -> str:
    """`4.1 GB`, or `at least 4.1 GB`."""
    return f"{at_least(peak.exact)}{format_gb(peak.size)}"


def _touched(test: RecordedTest, run: ActiveRun) -> bool | None:
    """Whether a test used the GPU; None where that is unknown."""
    if test.touched is not None:
        return test.touched
    record = run.workers.get(test.worker)
    if record is None:
        return None
    if record.seen is None and record.kept == 0:
        return False
    # Frameworks count only tests during which they were up.
    return False if any(m.counted is not None for m in run.workers) else None


def _makespan(tests: list[RecordedTest], gpus: int, cpus: int, idle: set[str]) -> float:
    """Seconds that the tests take, each given to the worker that is free first; GPU tests first."""
    free_gpu, free_cpu = [0.0] * gpus, [0.0] * cpus
    for test in sorted(tests, key=lambda t: t.nodeid in idle):
        lanes = free_gpu
        if test.nodeid in idle and free_cpu and min(free_cpu) <= min(free_gpu):
            lanes = free_cpu
        at = lanes.index(min(lanes))
        lanes[at] += (test.end or 0.0) - (test.start or 0.0)
    return max([*free_gpu, *free_cpu])


def _rounded(size: Fraction) -> int:
    """Up to half a GB."""
    return int(-(-size // STEP)) * STEP


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
