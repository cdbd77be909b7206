"""Lines about the routing of tests: what went where for another reason than its marker."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_gpushare.report.line import Line
from pytest_gpushare.run.started import Started
from pytest_gpushare.units import plural

_MOST_NAMES = 3


def routing(started: Started) -> Iterator[Line]:
    """What went elsewhere than its marker says, and what was skipped for it."""
    parity, marker = started.parity, started.settings.marker
    if parity is None:
        return
    lost = parity.lost
    if lost:
        names = [f"{skip.nodeid} ({skip.reason[:80]})" for skip in lost[:_MOST_NAMES]]
        more = f", and {len(lost) - len(names)} more" if len(lost) > len(names) else ""
        kind = " (an error under --gpu-share-strict)" if started.strict else ""
        yield Line(
            "gpu-share: skipped on CPU workers for want of a GPU: "
            f"{plural(len(lost), 'test')}; mark with {marker} what needs one: "
            f"{', '.join(names)}{more}{kind}",
            problem=True,
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
    if parity.has_cpu_workers and parity.tests and not parity.gpu_tests:
        yield Line(f"gpu-share: no GPU test was selected: no test is marked with {marker}")
