"""What a run left when its tests were over, and the lines that say so.

Each part is computed once, for all that is printed and written: what went wrong on the way, who
used which GPU, what to change. A run that took no VRAM has nothing to say of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.gpu.readings import DevicePeaks, DeviceSamples
from pytest_gpushare.planning.plan import DevicePlan
from pytest_gpushare.report.advice import (
    Assessment,
    admits_by_needs,
    amount,
    assess,
    declared_too_small,
    gpu_tests_without_gpu,
    over_need,
)
from pytest_gpushare.report.header import Line, OutputOptions, header
from pytest_gpushare.report.ollama_lines import lines_of_tests, verdict
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import Leak, RecordedTest, leaks
from pytest_gpushare.session.workers import Peak, WorkerRecord
from pytest_gpushare.text import printable, sparkline
from pytest_gpushare.units import MB, at_least, format_gb, plural

if TYPE_CHECKING:
    from pytest_gpushare.events import Event

MOST_PEAKS = 5


class Usage(NamedTuple):
    """The peaks of one device against its plan."""

    plan: DevicePlan
    peaks: DevicePeaks
    watched: DeviceSamples

    @property
    def peak_used(self) -> int:
        """Bytes in use at most, counting every process."""
        return self.peaks.used or 0

    @property
    def grown(self) -> int:
        """Bytes by which the device was fuller than at the start, at most."""
        return max(0, self.peak_used - self.plan.device.used)

    @property
    def is_attributed(self) -> bool:
        """Whether the driver attributed anything to workers: else the rise may be anybody's."""
        return bool(self.peaks.workers)

    @property
    def used(self) -> str:
        """`at least 7.2 GB`, with `at_least`."""
        return f"{at_least(self.peaks.is_used_exact)}{format_gb(self.peak_used)}"

    @property
    def tests(self) -> str:
        """`5.2 GB`, `at least 7.4 GB (3.9 GB of it unattributed)`; empty where unknown."""
        peaks = self.peaks
        if not self.is_attributed:
            return ""
        part = ""
        if peaks.is_unattributed:
            part = f" ({format_gb(peaks.unattributed)} of it unattributed)"
        return f"{at_least(peaks.is_rise_exact)}{format_gb(peaks.rise)}{part}"


class Results:
    """The results of a run; made when its tests are over, each part when it is first asked for."""

    def __init__(self, run: ActiveRun) -> None:
        self.run = run
        self.tests = list(run.tests)
        self.workers = list(run.workers)

    @cached_property
    def held(self) -> dict[str, Peak | None]:
        """Worker -> the most VRAM that it held; None where that is unknown."""
        return {member.id: member.held for member in self.workers}

    @cached_property
    def leaks(self) -> list[Leak]:
        """What tests left behind, the largest first."""
        return leaks(self.tests, self.workers)

    @cached_property
    def assessment(self) -> Assessment:
        """What lacked, and what to change."""
        return assess(self.run, self.over_need)

    @cached_property
    def over_need(self) -> list[tuple[RecordedTest, int]]:
        """Tests that held more than their declared needs, and these."""
        return over_need(self.run)

    @cached_property
    def problems(self) -> list[Line]:
        """What went wrong while the tests ran."""
        run = self.run
        return [
            *_overwritten(run),
            *_lost_hosts(run),
            *_verdict(run),
            *_routing(run),
            *_out_of_memory(run),
            *_needs_exceeded(self),
            *_needs_changed(run),
        ]

    @cached_property
    def hints(self) -> list[Line]:
        """What to change."""
        return list(_hints(self))

    @cached_property
    def usages(self) -> list[Usage]:
        """The devices that were watched."""
        watched = {} if self.run.sampler is None else self.run.sampler.devices
        return [
            Usage(plan, found.peaks.counted(*self._held_on(plan.device.uuid)), found)
            for plan in self.run.plan.devices
            if (found := watched.get(plan.device.uuid)) is not None and found.peaks.used is not None
        ]

    def _held_on(self, uuid: str) -> tuple[int, int | None]:
        """The bytes that one worker of a device is known to have held, and that all of them
        together have held at most; None where a worker, of those that ran tests, does not know."""
        busy = {test.worker for test in self.tests}
        held = [self.held[m.id] for m in self.workers if m.device == uuid and m.id in busy]
        known = [peak for peak in held if peak is not None]
        least = max((peak.size for peak in known), default=0)
        is_alone = self.run.settings.visible_devices == "own"
        if is_alone and len(known) == len(held) and all(peak.exact for peak in known):
            return least, sum(peak.size for peak in known)
        return least, None

    @cached_property
    def highest_peaks(self) -> list[RecordedTest]:
        """The tests that used the most VRAM, those alone of which that is known."""
        known = [test for test in self.tests if test.peak is not None]
        return sorted(known, key=lambda t: (-t.peak.size if t.peak else 0, t.nodeid))[:MOST_PEAKS]


WORTH_TELLING = 64 * MB
"""Bytes by which a device fills without anybody's tests: desktops do that all the time."""

_MOST_LEAKS = 3
_NARROWEST, _USUAL, _WIDEST = 8, 14, 40
_SPARE = 4
"""Columns for a blank, and for figures of other devices that are longer."""
_MOST_NAMES = 3


def _routing(run: ActiveRun) -> Iterator[Line]:
    """Tests that ran on other workers than their markers say, and tests skipped because of that."""
    parity, marker = run.routing.differences, run.settings.marker
    if parity is None:
        return
    lost = parity.lost()
    if lost:
        names = [f"{skip.nodeid} ({skip.reason[:80]})" for skip in lost[:_MOST_NAMES]]
        more = f", and {len(lost) - len(names)} more" if len(lost) > len(names) else ""
        kind = " (an error under --gpu-share-strict)" if run.strict else ""
        yield Line(
            "gpu-share: skipped on CPU workers for lack of a GPU: "
            f"{plural(len(lost), 'test')}; mark with {marker} what needs one: "
            f"{', '.join(names)}{more}{kind}",
            problem=True,
            mark=_mark(run),
        )
    if parity.by_skip:
        yield Line(
            "gpu-share: run on GPU workers, since markers skip it without a GPU: "
            f"{plural(len(parity.by_skip), 'test')}; mark with {marker} what needs one"
        )
    if parity.only_on_gpu or parity.only_on_cpu:
        yield Line(
            f"gpu-share: workers collected different tests: {parity.only_on_gpu} only GPU workers, "
            f"{parity.only_on_cpu} only CPU workers; each test ran where it was collected",
        )
    if parity.has_cpu_workers and parity.tests and not (parity.gpu_tests or parity.uses_models):
        yield Line(
            "gpu-share: no GPU test was selected: none of "
            f"{plural(parity.tests, 'selected test')} is marked with {marker}"
        )


MOST = 10
"""Tests that are listed one by one."""


def _out_of_memory(run: ActiveRun) -> Iterator[Line]:
    """Each test that ran out of memory: who held VRAM then, and how it went alone."""
    again = {event.facts["nodeid"]: event for event in run.record.events("oom-retried")}
    found = run.record.events("oom")
    texts = [_sentence(event, again.get(event.facts["nodeid"])) for event in found]
    yield from _first(texts, "ran out of VRAM: see their reports", problem=True)


def _sentence(event: Event, again: Event | None) -> str:
    if again is None:
        return event.text
    alone = "passed alone" if again.facts["outcome"] == "passed" else "failed alone"
    return f"{event.text}; {alone}"


def _needs_exceeded(results: Results) -> Iterator[Line]:
    """Tests that took more than they were admitted with, which their neighbours then lack."""
    named = {test.nodeid for test, _ in results.over_need}
    others = {
        event.facts["nodeid"]: event.text
        for event in results.run.record.events("need-exceeded")
        if event.facts["nodeid"] not in named
    }
    texts = [advice.text for advice in declared_too_small(results.run, results.over_need)]
    texts += [f"{text}: raise it, or let it be learned" for text in others.values()]
    yield from _first(texts, "took more VRAM than their needs", problem=True)


def _needs_changed(run: ActiveRun) -> Iterator[Line]:
    """Tests that took another amount than the one by which they are packed."""
    # Elsewhere nothing is admitted by what was learned, and nobody has to know.
    if "packed" in run.settings.presets:
        texts = [f"{text}: learned again" for text in _latest(run, "need-changed")]
        yield from _first(texts, "took other VRAM than when they last ran", problem=False)


def _latest(run: ActiveRun, kind: str) -> list[str]:
    """The last event of this kind of each test, in words."""
    found = {event.facts["nodeid"]: event for event in run.record.events(kind)}
    return [event.text for event in found.values()]


def _first(texts: Sequence[str], others: str, *, problem: bool) -> Iterator[Line]:
    """A line for each of the first few, and one with the number of the others."""
    for text in texts[:MOST]:
        yield Line(f"gpu-share: {text}", problem=problem)
    if len(texts) > MOST:
        more = plural(len(texts) - MOST, "test")
        yield Line(f"gpu-share: {more} more {others}", problem=problem)


def _overwritten(run: ActiveRun) -> Iterator[Line]:
    kind = " (an error under --gpu-share-strict)" if run.strict else ""
    for worker, how in sorted(run.overwritten.items()):
        text = f"gpu-share: {worker} does not see the GPU that it was given: {how}{kind}"
        yield Line(text, problem=True, mark=_mark(run))


def _mark(run: ActiveRun) -> str:
    """Red where a problem of this kind fails the run."""
    return "red" if run.strict else ""


def _verdict(run: ActiveRun) -> Iterator[Line]:
    for text in run.not_kept():
        yield Line(f"gpu-share: {text}")
    for host, monitor in run.monitors():
        where = f"{host}: " if host else ""
        if monitor.problem:
            text = f"{where}the monitor of Ollama's VRAM has failed: {monitor.problem}"
            yield Line(f"gpu-share: {text}", problem=True)
        for sentence in verdict(monitor.server) if monitor.server is not None else ():
            fails = sentence.is_ours and run.strict
            kind = " (an error under --gpu-share-strict)" if fails else ""
            yield Line(
                f"gpu-share: {where}{sentence.text}{kind}", sentence.is_problem, sentence.mark
            )
            for detail in sentence.details:
                yield Line(f"  {detail}", sentence.is_problem, sentence.mark)


def _lost_hosts(run: ActiveRun) -> Iterator[Line]:
    """A line for each host that was lost during the run."""
    for host in run.hosts:
        if host.lost:
            workers = plural(host.plan.workers, "worker")
            yield Line(
                f"gpu-share: host {host.label} was lost: {host.lost}: its {workers} were not "
                "replaced",
                problem=True,
            )


def _usage_lines(results: Results, view: OutputOptions) -> Iterator[Line]:
    """Devices and leaks; from -v also workers and the highest peaks."""
    members = [member for member in results.workers if member.role == "gpu"]
    peaks = [member for member in members if results.held[member.id] is not None]
    devices = [use for use in results.usages if use.grown > WORTH_TELLING]
    for use in devices:
        yield _device(use, view, any(m.device == use.plan.device.uuid for m in peaks))
    if view.verbosity >= 1 and (devices or peaks):
        for member in members:
            yield _worker(member, results)
        for test in results.highest_peaks:
            if test.peak is not None:
                yield Line(f"  VRAM {amount(test.peak)}: {printable(test.nodeid)}")
    yield from _leaks(results.leaks, view)


def _device(use: Usage, view: OutputOptions, counted: bool) -> Line:
    plan = use.plan
    peaks = use.peaks
    least = at_least(peaks.is_used_exact)
    used = _part(use.peak_used, plan.device.total)
    text = f"gpu-share: {plan.device.label} VRAM peak {least}{used}"
    if use.is_attributed:
        text += f", tests {at_least(peaks.is_rise_exact)}{_part(peaks.rise, plan.reach)}"
        if peaks.is_unattributed:
            text += f" ({format_gb(peaks.unattributed)} unattributed)"
    elif not counted and plan.workers:
        text += f" (up {least}{format_gb(use.grown)}, by which process is unknown)"
    over = use.is_attributed and plan.reach < peaks.rise
    room = view.columns - len(text) - _SPARE
    # Where the line has no room for it, it stands on the next one.
    heights = use.watched.series.heights(min(room, _WIDEST) if room >= _NARROWEST else _USUAL)
    text += f" {sparkline(height / max(1, plan.device.total) for height in heights)}"
    return Line(text, problem=over)


def _worker(member: WorkerRecord, results: Results) -> Line:
    run = results.run
    label = next(
        plan.device.label for plan in run.plan.devices if plan.device.uuid == member.device
    )
    crashed = ", crashed" if member.crashed else ""
    peak = results.held[member.id]
    if peak is None:
        return Line(f"  {member.id} on {label}: VRAM peak unknown{crashed}")
    least = at_least(peak.exact)
    if admits_by_needs(run):
        # A need may be more than a slot.
        return Line(f"  {member.id} on {label}: VRAM peak {least}{format_gb(peak.size)}{crashed}")
    return Line(
        f"  {member.id} on {label}: VRAM peak {least}{_part(peak.size, member.slot)}{crashed}",
        problem=peak.size > member.slot,
    )


def _leaks(found: Sequence[Leak], view: OutputOptions) -> Iterator[Line]:
    most = len(found) if view.verbosity >= 1 else _MOST_LEAKS
    for leak in found[:most]:
        yield Line(f"gpu-share: {leak_text(leak)}", problem=True)
    if len(found) > most:
        rest = found[most:]
        size = format_gb(sum(leak.size for leak in rest))
        who = plural(len(rest), "more leak")
        yield Line(f"gpu-share: {who} of VRAM, {size} in all (-v lists them)", problem=True)


def leak_text(leak: Leak) -> str:
    """Which test left how much, or among which tests it is."""
    size, first = format_gb(leak.size), printable(leak.suspects[0])
    if leak.among == 1:
        return f"{first} left {size} of VRAM behind ({leak.worker})"
    return f"{leak.worker} kept {size} of VRAM, left by one of {leak.among} tests from {first} on"


def _part(size: int, of: int) -> str:
    """`7.2 of 9.0 GB`."""
    return f"{format_gb(size).removesuffix(' GB')} of {format_gb(of)}"


HINT = "gpu-share: hint:"
"""How a line begins that says what to change."""


def _hints(results: Results) -> Iterator[Line]:
    """What to change; at the very end what GPU tests lacked, with the best of it."""
    run, advice = results.run, list(results.assessment.advice)
    lacking = gpu_tests_without_gpu(run)
    best = advice.pop(0) if lacking is not None and advice else None
    for each in advice:
        yield Line(f"{HINT} {each.text}")
    if lacking is not None:
        # Whoever has set them to be skipped without a GPU knows that.
        is_problem = bool(lacking.failed) or not run.plan.absence
        change = f": {best.change}" if best is not None else ""
        yield Line(f"gpu-share: {lacking.text}{change}", is_problem)


def summary(results: Results, view: OutputOptions) -> list[Line]:
    """The lines after the tests: problems that showed while they ran, what they used, and what to
    change; at -q one line where anything needs attention."""
    run = results.run
    lines = [
        *results.problems,
        *(Line(f"gpu-share: {text}", problem=True) for text in run.unwritten),
        *lines_of_tests(run, view),
        *_usage_lines(results, view),
        *results.hints,
    ]
    return lines if view.verbosity >= 0 else _attention(run, lines)


def _attention(run: ActiveRun, lines: Sequence[Line]) -> list[Line]:
    """One line: the gravest problem of the run, its header included, and how many more."""
    # What is indented belongs to the line above.
    found = [line for line in lines if line.problem and not line.text.startswith(" ")]
    found = [*sorted(found, key=lambda line: line.mark != "red"), *header(run, -1)]
    if len(found) < 2:
        return found
    more = plural(len(found) - 1, "more problem")
    return [found[0]._replace(text=f"{found[0].text} (and {more}: run without -q)")]
