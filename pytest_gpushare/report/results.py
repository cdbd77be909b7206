"""Who used which GPU, and how near to the limit: what the tests left in the samples.

A run that took no VRAM has nothing to say here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from pytest_gpushare.gpu.sampler import DevicePeaks, DeviceSamples
from pytest_gpushare.planning.plan import DevicePlan
from pytest_gpushare.report.advice import admits_by_needs, amount
from pytest_gpushare.report.header import Line, OutputOptions
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import Leak, RecordedTest, leaks
from pytest_gpushare.session.workers import WorkerRecord
from pytest_gpushare.text import printable, sparkline
from pytest_gpushare.units import MB, at_least, format_gb, plural

WORTH_TELLING = 64 * MB
"""Bytes by which a device fills without anybody's tests: desktops do that all the time."""

MOST_PEAKS = 5
_MOST_LEAKS = 3
_NARROWEST, _USUAL, _WIDEST = 8, 14, 40
_SPARE = 4
"""Columns for a blank, and for figures of other devices that are longer."""


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


def usages(run: ActiveRun) -> list[Usage]:
    """The devices that were watched."""
    watched = {} if run.sampler is None else run.sampler.devices
    busy = {test.worker for test in run.tests}
    return [
        Usage(plan, found.peaks.counted(*_held(run, plan.device.uuid, busy)), found)
        for plan in run.plan.devices
        if (found := watched.get(plan.device.uuid)) is not None and found.peaks.used is not None
    ]


def _held(run: ActiveRun, uuid: str, busy: Collection[str]) -> tuple[int, int | None]:
    """The bytes that one worker of a device is known to have held, and that all of them together
    have held at most; None where a worker, of those that ran tests, does not know."""
    held = [member.held for member in run.workers if member.device == uuid and member.id in busy]
    known = [peak for peak in held if peak is not None]
    least = max((peak.size for peak in known), default=0)
    is_alone = run.settings.visible_devices == "own"
    if is_alone and len(known) == len(held) and all(peak.exact for peak in known):
        return least, sum(peak.size for peak in known)
    return least, None


def highest_peaks(run: ActiveRun, most: int = MOST_PEAKS) -> list[RecordedTest]:
    """The tests that used the most VRAM, those alone of which that is known."""
    known = [test for test in run.tests if test.peak is not None]
    return sorted(known, key=lambda t: (-t.peak.size if t.peak else 0, t.nodeid))[:most]


def usage_lines(run: ActiveRun, view: OutputOptions) -> Iterator[Line]:
    """Devices and leaks; from -v also workers and the highest peaks."""
    members = [member for member in run.workers if member.role == "gpu"]
    peaks = [member for member in members if member.held is not None]
    devices = [use for use in usages(run) if use.grown > WORTH_TELLING]
    for use in devices:
        yield _device(use, view, any(m.device == use.plan.device.uuid for m in peaks))
    if view.verbosity >= 1 and (devices or peaks):
        for member in members:
            yield _worker(member, run)
        for test in highest_peaks(run):
            if test.peak is not None:
                yield Line(f"  VRAM {amount(test.peak)}: {printable(test.nodeid)}")
    yield from _leaks(leaks(run.tests, run.workers), view)


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


def _worker(member: WorkerRecord, run: ActiveRun) -> Line:
    label = next(
        plan.device.label for plan in run.plan.devices if plan.device.uuid == member.device
    )
    crashed = ", crashed" if member.crashed else ""
    peak = member.held
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
