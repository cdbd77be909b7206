"""The figures of a report: what was recorded during a run, added up when its tests are over.

All that is printed and written takes them from here, each computed once: `summary` for the
terminal and GitHub's job page, `document` for the JSON report, of which the HTML page is made.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from pytest_gpushare.gpu.readings import DevicePeaks, DeviceSamples
from pytest_gpushare.planning.plan import DevicePlan
from pytest_gpushare.report.advice import Assessment, OverNeed, assess, over_need
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import Leak, leaks
from pytest_gpushare.session.workers import Peak

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
    def over_need(self) -> list[OverNeed]:
        """Tests that held more than their declared needs."""
        return over_need(self.run)

    @cached_property
    def usages(self) -> list[Usage]:
        """The devices that were watched."""
        watched = self.run.samples
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
    def largest_needs(self) -> dict[str, int]:
        """Worker -> the largest need, in bytes, of a test that it ran; workers whose tests had none
        of their own left out."""
        found: dict[str, int] = {}
        for test in self.tests:
            need, source = self.run.tests.needs.get(test.nodeid, (0, ""))
            if need and source != "slot":
                found[test.worker] = max(need, found.get(test.worker, 0))
        return found

    @cached_property
    def highest_peaks(self) -> list[tuple[str, Peak]]:
        """The node ids of the tests that used the most VRAM, as far as that is known."""
        known = [(test.nodeid, test.peak) for test in self.tests if test.peak is not None]
        return sorted(known, key=lambda each: (-each[1].size, each[0]))[:MOST_PEAKS]
