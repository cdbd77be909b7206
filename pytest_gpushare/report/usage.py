"""Who used which GPU, and how near to the limit: what the tests left in the samples.

A run that took no VRAM has nothing to say here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pytest_gpushare.plan.model import DevicePlan
from pytest_gpushare.report.hints import hints
from pytest_gpushare.report.left_behind import Leak, leaks
from pytest_gpushare.report.line import Line, View
from pytest_gpushare.run.crew import Member
from pytest_gpushare.run.journal import Test
from pytest_gpushare.run.started import Started
from pytest_gpushare.run.watch import Watched
from pytest_gpushare.units import MB, format_gb, plural

WORTH_TELLING = 64 * MB
"""Bytes by which a device fills without anybody's tests: desktops do that all the time."""

HUNGRIEST = 5
_MOST_LEAKS = 3
_NARROWEST, _WIDEST = 8, 40
_BARS = "▁▂▃▄▅▆▇█"
_SHORTEST_ID = 20


class Usage(NamedTuple):
    """What one device has been through."""

    plan: DevicePlan
    peak_used: int
    """Bytes in use at most, by whomever."""
    peak_workers: int | None
    """Bytes that the workers held together at most; None where NVML does not tell."""
    watched: Watched

    @property
    def grown(self) -> int:
        """Bytes by which the device was fuller than at the start, at most."""
        return max(0, self.peak_used - self.plan.device.used)


def usages(started: Started) -> list[Usage]:
    """The devices that were watched."""
    watched = {} if started.watch is None else started.watch.devices
    return [
        Usage(plan, found.peak_used, found.peak_workers, found)
        for plan in started.plan.devices
        if (found := watched.get(plan.device.uuid)) is not None and found.peak_used is not None
    ]


def hungriest(started: Started, most: int = HUNGRIEST) -> list[Test]:
    """The tests that used the most VRAM, those alone of which that is known."""
    known = [test for test in started.journal if test.peak is not None]
    return sorted(known, key=lambda t: (-t.peak.size if t.peak else 0, t.nodeid))[:most]


def usage_lines(started: Started, view: View) -> Iterator[Line]:
    """Devices, leaks and hints; from -v also workers and the hungriest tests; nothing at -q."""
    if view.verbosity < 0:
        return
    members = [member for member in started.crew if member.role == "gpu"]
    peaks = [member for member in members if member.peak is not None]
    devices = [use for use in usages(started) if use.grown > WORTH_TELLING]
    if not devices and not peaks:
        return
    for use in devices:
        yield _device(use, view, any(m.device == use.plan.device.uuid for m in peaks))
    if view.verbosity >= 1:
        for member in members:
            yield _worker(member, started)
        for test in hungriest(started):
            yield Line(_test(test, view))
    yield from _leaks(leaks(started), view)
    for hint in hints(started):
        yield Line(f"gpu-share: hint: {hint.text}")


def _device(use: Usage, view: View, counted: bool) -> Line:
    plan = use.plan
    text = f"gpu-share: {plan.device.label} VRAM peak {_part(use.peak_used, plan.device.total)}"
    if use.peak_workers:
        text += f", tests {_part(use.peak_workers, plan.budget)}"
    elif not counted and plan.workers:
        text += f" (up {format_gb(use.grown)}, by whom is unknown)"
    over = use.peak_workers is not None and plan.budget < use.peak_workers
    room = view.columns - len(text) - 1
    if room >= _NARROWEST:
        heights = use.watched.series.heights(min(room, _WIDEST))
        text += f" {sparkline(heights, plan.device.total)}"
    return Line(text, problem=over)


def _worker(member: Member, started: Started) -> Line:
    label = next(
        plan.device.label for plan in started.plan.devices if plan.device.uuid == member.device
    )
    crashed = ", crashed" if member.crashed else ""
    peak = member.peak
    if peak is None:
        return Line(f"  {member.id} on {label}: VRAM peak unknown{crashed}")
    least = "" if peak.exact else "at least "
    if started.has_needs:
        # Tests are admitted by their needs, which may be more than a slot.
        return Line(f"  {member.id} on {label}: VRAM peak {least}{format_gb(peak.size)}{crashed}")
    return Line(
        f"  {member.id} on {label}: VRAM peak {least}{_part(peak.size, member.slot)}{crashed}",
        problem=peak.size > member.slot,
    )


def _test(test: Test, view: View) -> str:
    assert test.peak is not None
    least = "" if test.peak.exact else "at least "
    text = f"  VRAM {least}{format_gb(test.peak.size)}: "
    return text + shortened(test.nodeid, view.columns - len(text))


def _leaks(found: Sequence[Leak], view: View) -> Iterator[Line]:
    most = len(found) if view.verbosity >= 1 else _MOST_LEAKS
    for leak in found[:most]:
        yield Line(f"gpu-share: {leak_in_words(leak, view.columns - 11)}", problem=True)
    if len(found) > most:
        rest = found[most:]
        size = format_gb(sum(leak.size for leak in rest))
        who = plural(len(rest), "more leak")
        yield Line(f"gpu-share: {who} of VRAM, {size} in all (-v lists them)", problem=True)


def leak_in_words(leak: Leak, room: int = 200) -> str:
    """Which test left how much, or among which tests it is."""
    size, first = format_gb(leak.size), leak.suspects[0]
    if leak.among == 1:
        end = f" left {size} of VRAM behind ({leak.worker})"
        return shortened(first, room - len(end)) + end
    start = f"{leak.worker} kept {size} of VRAM, left by one of {leak.among} tests from "
    return f"{start}{shortened(first, room - len(start) - 3)} on"


def sparkline(heights: Sequence[int], most: int) -> str:
    """A bar for each height, in eighths of `most`."""
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, height * len(_BARS) // max(1, most))] for height in heights)


def shortened(nodeid: str, room: int) -> str:
    """A node id in so much room, but never below what still tells something: its end counts."""
    nodeid = "".join(c if c.isprintable() else "?" for c in nodeid)
    room = max(room, _SHORTEST_ID)
    return nodeid if len(nodeid) <= room else f"...{nodeid[len(nodeid) - room + 3 :]}"


def _part(size: int, of: int) -> str:
    """`7.2 of 9.0 GB`."""
    return f"{format_gb(size).removesuffix(' GB')} of {format_gb(of)}"
